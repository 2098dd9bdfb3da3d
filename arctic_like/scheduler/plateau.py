"""The learning rate falls when a metric stops improving."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.scheduler.base import Interval, SchedulerConfig, SchedulerFactory

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class PlateauConfig(SchedulerConfig):
    """Lower the rate when an evaluation metric stops improving."""

    intervals: ClassVar[tuple[Interval, ...]] = ("metric",)

    type: str = "plateau"

    interval: Interval = "metric"
    """`metric`: it moves after each evaluation that has the metric."""

    mode: Literal["min", "max"] | None = None
    """Whether lower (`min`) or higher (`max`) is better; by the metric unless given."""

    factor: HumanFloat = Field(default=0.1, gt=0, lt=1)
    """The learning rate is multiplied by it."""

    patience: HumanInt = Field(default=10, ge=0)
    """So many evaluations without improvement are borne; the next one lowers the rate."""

    threshold: HumanFloat = Field(default=1e-4, ge=0)
    """Smaller improvements are none."""

    threshold_mode: Literal["rel", "abs"] = "rel"
    """Whether `threshold` is a share of the best value or a difference to it. A share is
    meaningful for positive metrics only."""

    cooldown: HumanInt = Field(default=0, ge=0)
    """So many evaluations after lowering the rate count as neither good nor bad."""

    min_lr: HumanFloat = Field(default=0.0, ge=0)
    """The rate does not fall below it."""

    eps: HumanFloat = Field(default=1e-8, ge=0)
    """A fall of the rate by less is not made."""


class PlateauFactory(SchedulerFactory):
    """Lower the rate when an evaluation metric stops improving: torch's ReduceLROnPlateau."""

    name = "plateau"
    config_type = PlateauConfig
    config: PlateauConfig

    def build(self, *, optimizer: Optimizer, mode: Literal["min", "max"]) -> LRScheduler:  # type: ignore[override]
        """torch's ReduceLROnPlateau. mode: the metric's direction, where the recipe gives none."""
        from torch.optim.lr_scheduler import ReduceLROnPlateau

        config = self.config
        return ReduceLROnPlateau(
            optimizer,
            mode=config.mode or mode,
            factor=config.factor,
            patience=config.patience,
            threshold=config.threshold,
            threshold_mode=config.threshold_mode,
            cooldown=config.cooldown,
            min_lr=config.min_lr,
            eps=config.eps,
        )
