"""What a recipe says of a learning-rate schedule, by what it moves on, and how long its warm-up is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry import Part

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Interval = Literal["step", "epoch", "metric"]


@dataclass(frozen=True)
class Lengths:
    """A run's lengths in the unit that a schedule moves by: optimizer steps, or epochs."""

    total: int
    warmup: int
    steps_per_epoch: int
    """Units per epoch: 1 where the unit is the epoch."""
    epochs: int
    """Epochs of the run, a begun one included."""


class SchedulerConfig(PartConfig):
    """The recipe's `scheduler:`."""

    aliases = {"lr": "learning_rate"}
    not_yet = {"learning_rate": "optimizer.learning_rate sets the highest learning rate"}
    intervals: ClassVar[tuple[Interval, ...]] = ("step", "epoch")
    """By what schedules of this kind can move."""

    type: str = "huggingface"
    """Which schedule: a registered name, or a class by its dotted path
    (`torch.optim.lr_scheduler.ExponentialLR`)."""

    interval: Interval = "step"
    """When it moves: after each optimizer `step`, after each `epoch` (and its evaluation; all its
    lengths are then epochs), or by a `metric`, after each evaluation."""

    metric: str = ""
    """The evaluation metric that it follows with `interval: metric`; the recipe's `metric_monitor`
    unless given."""

    warmup_ratio: HumanFloat = Field(default=0.1, ge=0, le=1)
    """Share of all steps in which the learning rate rises, rounded down to whole steps."""

    warmup_steps: HumanInt | None = Field(default=None, ge=0)
    """Steps in which the learning rate rises; in place of `warmup_ratio`."""

    learning_rate: HumanFloat | None = None
    """Old place of `optimizer.learning_rate`; refused before a run."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.given("warmup_ratio"):
            raise wrong(
                "and warmup_ratio are both given", place="warmup_steps", hint="keep one of them"
            )
        return self

    @model_validator(mode="after")
    def _can_move_so(self) -> Self:
        allowed = self.allowed_intervals()
        if self.interval not in allowed:
            if allowed == ("metric",):
                message, hint = "but this schedule follows a metric", "set it to metric"
            else:
                message = "but this schedule is a function of the step"
                hint = "set it to step or epoch, or take a schedule that follows a metric: plateau"
            raise wrong(f"is {self.interval!r}, {message}", place="interval", hint=hint)
        if self.metric and self.interval != "metric":
            raise wrong(
                f"is {self.metric!r}, but the schedule moves by the {self.interval}",
                place="metric",
                hint="remove it, or take a schedule that follows a metric, such as plateau",
            )
        if allowed == ("metric",) and (self.warmup_steps or self.given("warmup_ratio")):
            raise wrong(
                "is given, but a schedule that follows a metric has no warm-up",
                place="warmup_steps" if self.warmup_steps else "warmup_ratio",
                hint="remove it",
            )
        return self

    def allowed_intervals(self) -> tuple[Interval, ...]:
        """By what this schedule can move, as far as the recipe tells."""
        return self.intervals

    def resolve_warmup(self, total_steps: int) -> int:
        """The warm-up's length in steps (epochs with `interval: epoch`), for a run of `total_steps`.

        Raises RecipeError where no step would be left after the warm-up.
        """
        if self.interval == "metric":
            return 0
        if self.warmup_steps is None:
            key, value = "warmup_ratio", self.warmup_ratio
            # 0.29 * 100 is 28.999999999999996; it means 29.
            steps = math.floor(self.warmup_ratio * total_steps + 1e-9)
        else:
            key, value = "warmup_steps", self.warmup_steps
            steps = self.warmup_steps
        if steps and steps >= total_steps:
            raise RecipeError(
                Problem(
                    f"{value} leaves no {self.unit} after the warm-up; "
                    f"the run has {total_steps} {self.unit}s",
                    place=f"scheduler.{key}",
                    hint="lower it, or train for more steps (train_iters, epochs)",
                )
            )
        return steps

    @property
    def unit(self) -> str:
        """What its lengths are counted in: "step" or "epoch"."""
        return "epoch" if self.interval == "epoch" else "step"

    def lengths(self, *, total_steps: int, steps_per_epoch: int | None) -> Lengths:
        """A run's lengths in this schedule's unit. Raises RecipeError where they do not fit."""
        if self.interval == "epoch" and not steps_per_epoch:
            raise RecipeError(
                Problem(
                    "is 'epoch', but this run's data has no epochs",
                    place="scheduler.interval",
                    hint="set it to step",
                )
            )
        per_epoch = steps_per_epoch or total_steps
        epochs = -(-total_steps // per_epoch)
        total, per_epoch = (epochs, 1) if self.interval == "epoch" else (total_steps, per_epoch)
        return Lengths(total, self.resolve_warmup(total), per_epoch, epochs)

    def warmup_in_steps(self, *, total_steps: int, steps_per_epoch: int | None) -> int:
        """The warm-up's length in optimizer steps, whatever the schedule moves by."""
        lengths = self.lengths(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        unit = (steps_per_epoch or 1) if self.interval == "epoch" else 1
        return lengths.warmup * unit


class SchedulerFactory(Part, family="scheduler"):
    """Builds the learning-rate schedule of a run."""

    config_type = SchedulerConfig
    config: SchedulerConfig
    dotted: ClassVar[str] = "module.Class"

    def build(self, *, optimizer: Optimizer, total_steps: int, warmup_steps: int) -> LRScheduler:
        """A scheduler over the parameter groups that it is given, to be stepped after each step.

        optimizer: has the groups that follow this schedule, `defaults` with their learning rate,
        and no `step` of its own. Lengths are in steps, or in epochs with `interval: epoch`; also to
        be had by name: `steps_per_epoch`, `epochs`, `mode` ("min" | "max", of the metric).
        The step with index s (0 ≤ s < total_steps) trains at `learning_rate · f(s)`. A schedule
        that follows a metric has `step(metrics)`. Raises RecipeError where the schedule's own
        settings do not fit.
        """
        raise NotImplementedError
