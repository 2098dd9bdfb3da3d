"""Lion: the sign of an interpolation of momentum and gradient (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from arctic_like.config.values import HumanFloat
from arctic_like.optimizer.adam import Betas, within_unit_interval
from arctic_like.optimizer.base import GroupConfig, OptimizerConfig, OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class LionGroupConfig(GroupConfig):
    """Some parameters with settings of their own."""

    betas: Betas | None = None
    """The group's `betas`."""

    _check_betas = field_validator("betas")(within_unit_interval)


class LionConfig(OptimizerConfig):
    """Lion. Its authors advise a third to a tenth of AdamW's learning rate, and as much more decay."""

    type: str = "lion"

    learning_rate: HumanFloat = Field(default=1e-4, ge=0)
    """The highest learning rate, by which every weight moves in a step; the scheduler scales it."""

    betas: Betas = (0.9, 0.99)
    """Weight of the momentum against the gradient in the update, and decay of the momentum."""

    groups: tuple[LionGroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    _check_betas = field_validator("betas")(within_unit_interval)


class LionFactory(OptimizerFactory):
    """Lion of pytorch_optimizer, on every device and at every ZeRO stage; keeps one state a weight."""

    name = "lion"
    config_type = LionConfig
    config: LionConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """pytorch_optimizer.Lion. Raises RecipeError without the package."""
        config = self.config
        package = needed("pytorch_optimizer", optimizer=self.name, extra="optimizers")
        optimizer: Optimizer = package.Lion(
            parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups),
            lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay,
        )  # fmt: skip
        return optimizer
