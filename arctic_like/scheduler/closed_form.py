"""Schedules that are pure functions of the step: warm-up–stable–decay, and cosine to a floor.

Each covers exactly the steps s = 0 … total - 1 of the run: no step trains at a rate of zero, and
the highest rate is reached at step `warmup`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.scheduler.base import SchedulerConfig, SchedulerFactory

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Shape = Literal["linear", "cosine", "sqrt"]


class WSDConfig(SchedulerConfig):
    """Warm-up, a plateau, then a decay."""

    type: str = "wsd"

    decay_ratio: HumanFloat = Field(default=0.1, ge=0, le=1)
    """Share of all steps, at the end, in which the learning rate falls; rounded up."""

    decay_steps: HumanInt | None = Field(default=None, ge=0)
    """Steps, at the end, in which the learning rate falls; in place of `decay_ratio`."""

    decay_shape: Shape = "sqrt"
    """How it falls: `linear`, `cosine`, or `sqrt` (1 - √progress, steep first)."""

    min_lr_ratio: HumanFloat = Field(default=0.0, ge=0, le=1)
    """Where the decay leads, as a share of the highest learning rate."""

    @model_validator(mode="after")
    def _one_decay(self) -> Self:
        if self.decay_steps is not None and self.given("decay_ratio"):
            raise wrong(
                "and decay_ratio are both given", place="decay_steps", hint="keep one of them"
            )
        return self

    def resolve_decay(self, total_steps: int) -> int:
        """The decay's length in steps, for a run of `total_steps`."""
        if self.decay_steps is not None:
            return self.decay_steps
        return math.ceil(self.decay_ratio * total_steps - 1e-9)


class CosineWithFloorConfig(SchedulerConfig):
    """Warm-up, then half a cosine down to a floor."""

    type: str = "cosine_with_floor"

    min_lr_ratio: HumanFloat = Field(default=0.1, ge=0, le=1)
    """The floor, as a share of the highest learning rate; the last step trains at it."""


class WSDFactory(SchedulerFactory):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM, section 4; `sqrt`: Hägele et al. 2024, 4.2)."""

    name = "wsd"
    config_type = WSDConfig
    config: WSDConfig

    def build(self, *, optimizer: Optimizer, total_steps: int, warmup_steps: int) -> LRScheduler:
        from torch.optim.lr_scheduler import LambdaLR

        decay_steps = self.config.resolve_decay(total_steps)
        if warmup_steps + decay_steps > total_steps:
            raise RecipeError(
                Problem(
                    f"warm-up ({warmup_steps} steps) and decay ({decay_steps}) are longer together "
                    f"than the run ({total_steps})",
                    place="scheduler",
                    hint="lower scheduler.warmup_steps or scheduler.decay_steps (or the ratios), "
                    "or train for more steps",
                )
            )
        function = partial(
            wsd,
            total=total_steps,
            warmup=warmup_steps,
            decay=decay_steps,
            shape=self.config.decay_shape,
            floor=self.config.min_lr_ratio,
        )
        return LambdaLR(optimizer, function)


class CosineWithFloorFactory(SchedulerFactory):
    """Warm-up, then half a cosine down to a floor."""

    name = "cosine_with_floor"
    config_type = CosineWithFloorConfig
    config: CosineWithFloorConfig

    def build(self, *, optimizer: Optimizer, total_steps: int, warmup_steps: int) -> LRScheduler:
        from torch.optim.lr_scheduler import LambdaLR

        function = partial(
            cosine_with_floor,
            total=total_steps,
            warmup=warmup_steps,
            floor=self.config.min_lr_ratio,
        )
        return LambdaLR(optimizer, function)


def wsd(step: int, *, total: int, warmup: int, decay: int, shape: Shape, floor: float) -> float:
    """Share of the highest rate at `step`: up over `warmup` steps, 1, down over the last `decay`.

    The floor itself would be reached one step after the run, as the warm-up started from zero one
    step before it.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    into = step - (total - decay) + 1
    if into <= 0:
        return 1.0
    return floor + (1.0 - floor) * falling(min(into / (decay + 1), 1.0), shape=shape)


def cosine_with_floor(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Share of the highest rate at `step`: 1 at step `warmup`, `floor` at the last step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - 1 - warmup, 1), 1.0)
    return floor + (1.0 - floor) * falling(progress, shape="cosine")


def falling(progress: float, *, shape: Shape) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - math.sqrt(progress)
