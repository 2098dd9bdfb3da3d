"""Schedules that would not do what the recipe says: found when they are built, told at their place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from arctic_like.scheduler.base import SchedulerConfig


def check_groups(optimizer: Optimizer, groups: Mapping[str, Any], have: set[str]) -> None:
    """Raise RecipeError where the recipe has groups that the optimizer was built without."""
    missing = [name for name in groups if name not in have]
    if missing:
        raise RecipeError(
            Problem(
                f"has {', '.join(map(repr, missing))}, but {type(optimizer).__qualname__} was "
                "built without",
                "optimizer.groups",
                "its factory must take its groups from arctic_like.optimizer.groups",
            )
        )


def check_interval(config: SchedulerConfig, scheduler: Any) -> None:
    """Raise RecipeError where a scheduler waits for a metric that it would not get, or the reverse."""
    if needs_metric(scheduler) == (config.interval == "metric"):
        return
    name, place = type(scheduler).__qualname__, "scheduler.interval"
    if config.interval == "metric":
        raise RecipeError(
            Problem(f"is 'metric', but {name} follows no metric", place, "set it to step or epoch")
        )
    raise RecipeError(
        Problem(f"is {config.interval!r}, but {name} follows a metric", place, "set it to metric")
    )


def needs_metric(scheduler: Any) -> bool:
    """Whether a scheduler's `step` cannot be called without a metric."""
    first = next(iter(inspect.signature(scheduler.step).parameters.values()), None)
    return (
        first is not None
        and first.default is first.empty
        and first.kind is not first.VAR_POSITIONAL
    )


def check_first_epoch(config: SchedulerConfig, *, stated: list[float], rates: list[float]) -> None:
    """Raise RecipeError where a whole epoch would be trained at a rate of 0, for a warm-up's sake.

    stated: the groups' learning rates in the recipe; rates: those of the first epoch.
    """
    if config.interval == "epoch" and any(stated) and not any(rates):
        raise RecipeError(
            Problem(
                "is 'epoch', and the whole first epoch would have a learning rate of 0",
                "scheduler.interval",
                "set scheduler.warmup_ratio to 0, or take wsd or cosine_with_floor, whose warm-up "
                "begins above 0",
            )
        )


def below(error: RecipeError, prefix: str) -> RecipeError:
    """The same problems, at the place of a group's own schedule."""
    return RecipeError([replace(p, place=prefix + p.place) for p in error.problems])
