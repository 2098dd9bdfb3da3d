"""Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat
from arctic_like.optimizer.base import GroupConfig, OptimizerConfig, OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class SGDGroupConfig(GroupConfig):
    """Some parameters with settings of their own."""

    momentum: Annotated[HumanFloat, Field(ge=0, lt=1)] | None = None
    """The group's `momentum`."""


class SGDConfig(OptimizerConfig):
    """SGD of torch."""

    type: str = "sgd"

    learning_rate: HumanFloat = Field(default=1e-2, ge=0)
    """The highest learning rate; the scheduler scales it from step to step."""

    weight_decay: HumanFloat = Field(default=0.0, ge=0)
    """Added to the gradient of matrices and embeddings, times the weights (L2); norms and biases are
    never decayed."""

    momentum: HumanFloat = Field(default=0.9, ge=0, lt=1)
    """Decay of the running sum of gradients; 0 is plain gradient descent."""

    dampening: HumanFloat = Field(default=0.0, ge=0, le=1)
    """What a new gradient counts less in that sum."""

    nesterov: bool = False
    """Nesterov's momentum: the gradient is taken once more beside the sum."""

    groups: tuple[SGDGroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    @model_validator(mode="after")
    def _nesterov(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise wrong(
                f"is true, with momentum {self.momentum} and dampening {self.dampening}; it needs "
                "momentum above 0 and no dampening",
                place="nesterov",
            )
        return self


class SGDFactory(OptimizerFactory):
    """torch's SGD with momentum, on every device and at every ZeRO stage."""

    name = "sgd"
    config_type = SGDConfig
    config: SGDConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """torch.optim.SGD."""
        import torch

        config = self.config
        return torch.optim.SGD(
            parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups),
            lr=config.learning_rate, momentum=config.momentum, dampening=config.dampening,
            weight_decay=config.weight_decay, nesterov=config.nesterov,
        )  # fmt: skip
