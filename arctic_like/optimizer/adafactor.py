"""Adafactor: second moments as rows times columns (Shazeer and Stern 2018, algorithm 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from arctic_like.config.values import HumanFloat
from arctic_like.optimizer.base import OptimizerConfig, OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class AdafactorConfig(OptimizerConfig):
    """Adafactor of torch: nearly no memory for states. ZeRO stage 0 only."""

    type: str = "adafactor"

    learning_rate: HumanFloat = Field(default=1e-2, ge=0)
    """The highest learning rate, as a share of a parameter's root mean square, and at most 1/√step; the
    scheduler scales it."""

    beta2_decay: HumanFloat = Field(default=-0.8, lt=0)
    """The second moment decays by 1 - step^beta2_decay."""

    eps: Annotated[HumanFloat, Field(gt=0)] | None = None
    """Added to the squared gradient; the dtype's precision unless given."""

    smallest_scale: HumanFloat = Field(default=1e-3, gt=0)
    """The root mean square that parameters have at least when the learning rate is scaled by it (ε₂)."""

    clip_threshold: HumanFloat = Field(default=1.0, ge=1)
    """The root mean square that an update has at most (d)."""


class AdafactorFactory(OptimizerFactory):
    """torch's Adafactor, at ZeRO stage 0."""

    name = "adafactor"
    config_type = AdafactorConfig
    config: AdafactorConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """torch.optim.Adafactor."""
        import torch

        config = self.config
        return torch.optim.Adafactor(
            parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups),
            lr=config.learning_rate, beta2_decay=config.beta2_decay,
            eps=(config.eps, config.smallest_scale), d=config.clip_threshold,
            weight_decay=config.weight_decay,
        )  # fmt: skip
