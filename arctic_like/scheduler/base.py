"""What a recipe says of a learning-rate schedule, and how long its warm-up is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry import Part

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


class SchedulerConfig(PartConfig):
    """The recipe's `scheduler:`. All lengths are counted in optimizer steps."""

    aliases = {"lr": "learning_rate"}
    not_yet = {"learning_rate": "optimizer.learning_rate sets the highest learning rate"}

    type: str = "huggingface"
    """Which schedule: `huggingface`, `wsd`, `cosine_with_floor`, or a user's own."""

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

    def resolve_warmup(self, total_steps: int) -> int:
        """The warm-up's length in steps, for a run of `total_steps`.

        Raises RecipeError where no step would be left after the warm-up.
        """
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
                    f"{value} leaves no step after the warm-up; the run has {total_steps} steps",
                    place=f"scheduler.{key}",
                    hint="lower it, or train for more steps (train_iters, epochs)",
                )
            )
        return steps


class SchedulerFactory(Part, family="scheduler"):
    """Builds the learning-rate schedule of a run."""

    config_type = SchedulerConfig
    config: SchedulerConfig

    def build(self, *, optimizer: Optimizer, total_steps: int, warmup_steps: int) -> LRScheduler:
        """A scheduler over the plain torch optimizer, to be stepped once after each optimizer step.

        The step with index s (0 ≤ s < total_steps) trains at `optimizer.learning_rate · f(s)`.
        Raises RecipeError where the schedule's own settings do not fit.
        """
        raise NotImplementedError
