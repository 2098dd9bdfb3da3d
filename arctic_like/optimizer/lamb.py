"""LAMB: Adam's update, scaled for each tensor by a trust ratio (You et al. 2020, algorithm 2).

As in the third version of the paper and in its authors' code there is no bias correction, which the
trust ratio would undo, and weights count up to a norm of 10.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from arctic_like.config.values import HumanFloat
from arctic_like.optimizer.adam import AdamConfig
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class LambConfig(AdamConfig):
    """LAMB, for very large batches. ZeRO stage 0 only."""

    type: str = "lamb"

    learning_rate: HumanFloat = Field(default=2e-3, ge=0)
    """The highest learning rate, the share of its norm by which a tensor moves; the scheduler scales it."""

    eps: HumanFloat = Field(default=1e-6, gt=0)
    """Added to the root of the second moment, and to the norm of an update, against division by zero."""


class LambFactory(OptimizerFactory):
    """LAMB of pytorch_optimizer, at ZeRO stage 0."""

    name = "lamb"
    config_type = LambConfig
    config: LambConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """pytorch_optimizer.Lamb. Raises RecipeError without the package.

        Decay is part of the update that the ratio scales. Norms and biases have the ratio 1, as the
        paper's authors have it.
        """
        config = self.config
        package = needed("pytorch_optimizer", optimizer=self.name, extra="optimizers")
        groups = parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups)
        for group in groups:
            group["adam"] = all(parameter.ndim < 2 for parameter in group["params"])
        optimizer: Optimizer = package.Lamb(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, weight_decouple=False,
            adam_debias=True,  # the package would divide the scaled update by 1 - beta1^t
        )  # fmt: skip
        return optimizer
