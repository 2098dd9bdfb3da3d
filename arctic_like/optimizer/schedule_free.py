"""Schedule-free AdamW (Defazio et al. 2024, algorithm 1): an average of the weights, no schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.optimizer.adam import AdamConfig
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class ScheduleFreeAdamWConfig(AdamConfig):
    """Schedule-free AdamW. Give it `scheduler: {name: constant}`, and its own warm-up. ZeRO stages 0 to 2."""

    type: str = "schedule_free_adamw"

    learning_rate: HumanFloat = Field(default=2.5e-3, ge=0)
    """The learning rate after the warm-up. A schedule would scale it too."""

    warmup_steps: HumanInt = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly to its full value."""

    r: HumanFloat = Field(default=0.0, ge=0)
    """The average's weights grow with the r-th power of the step."""

    weight_lr_power: HumanFloat = Field(default=2.0, ge=0)
    """The average's weights grow with this power of the largest learning rate so far."""


class ScheduleFreeAdamWFactory(OptimizerFactory):
    """AdamWScheduleFree of schedulefree, at ZeRO stages 0 to 2; evaluated and exported at its average."""

    name = "schedule_free_adamw"
    config_type = ScheduleFreeAdamWConfig
    config: ScheduleFreeAdamWConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """schedulefree.AdamWScheduleFree. Raises RecipeError without the package."""
        config = self.config
        package = needed("schedulefree", optimizer=self.name, extra="optimizers")
        optimizer: Optimizer = package.AdamWScheduleFree(
            parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups),
            lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, warmup_steps=config.warmup_steps, r=config.r,
            weight_lr_power=config.weight_lr_power,
        )  # fmt: skip
        return optimizer
