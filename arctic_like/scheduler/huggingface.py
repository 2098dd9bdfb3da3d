"""Every schedule that transformers knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.errors import Problem, RecipeError
from arctic_like.scheduler.base import Interval, SchedulerConfig, SchedulerFactory

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

ScheduleName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
"""The values of `transformers.SchedulerType` (a test compares them)."""

NEEDS_METRIC = ("reduce_lr_on_plateau", "greedy")


class HFSchedulerConfig(SchedulerConfig):
    """A schedule of `transformers.get_scheduler`."""

    type: str = "huggingface"

    name: ScheduleName = "linear"
    """The schedule's name in transformers."""

    scheduler_specific_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of that schedule, such as `num_cycles` or `min_lr_rate`."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        stated = self.warmup_steps or (self.given("warmup_ratio") and self.warmup_ratio)
        if self.name == "constant" and stated:
            raise wrong(
                "is 'constant', which has no warm-up",
                place="name",
                hint="take 'constant_with_warmup', or leave out the warm-up",
            )
        return self

    def allowed_intervals(self) -> tuple[Interval, ...]:
        """By a metric for the schedules that follow one."""
        return ("metric",) if self.name in NEEDS_METRIC else self.intervals

    def resolve_warmup(self, total_steps: int) -> int:
        """The warm-up's length; 0 for `constant`, which has none."""
        return 0 if self.name == "constant" else super().resolve_warmup(total_steps)


class HFSchedulerFactory(SchedulerFactory):
    """Every schedule of transformers. Warm-up starts at 0 and decay ends one step after the run."""

    name = "huggingface"
    config_type = HFSchedulerConfig
    config: HFSchedulerConfig

    def build(
        self,
        *,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int,
        mode: Literal["min", "max"] = "min",
    ) -> LRScheduler:
        """The schedule of transformers; `mode` is for those that follow a metric."""
        from transformers import get_scheduler

        own = dict(self.config.scheduler_specific_kwargs)
        if self.config.interval == "metric":
            own.setdefault("mode", mode)
        try:
            scheduler: LRScheduler = get_scheduler(
                self.config.name,
                optimizer=optimizer,
                num_warmup_steps=warmup_steps,
                num_training_steps=total_steps,
                scheduler_specific_kwargs=own,
            )
        except (TypeError, ValueError) as error:
            raise RecipeError(
                Problem(
                    f"the schedule {self.config.name!r} refuses its settings: {error}",
                    place="scheduler.scheduler_specific_kwargs",
                    hint=f"it takes {_accepted(self.config.name)}",
                )
            ) from error
        return scheduler


def _accepted(name: str) -> str:
    """The arguments that are a schedule's own, as a sentence's end."""
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters
    return ", ".join(key for key in parameters if key not in given) or "none"
