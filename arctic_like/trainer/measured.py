"""Schedules that wait for a metric need evaluations: said at validation, and before the model is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arctic_like.config.base import Config
from arctic_like.errors import Problem, RecipeError


def metric_schedules(config: Config) -> list[str]:
    """The places of all schedules with `interval: metric` in a recipe, groups' and learners' included."""
    return [place for place, inner in _configs(config, "") if _waits(inner)]


def check_measured(config: Config, *, sets: int) -> None:
    """Raise RecipeError where a schedule waits for a metric and there are no evaluation sets."""
    if sets:
        return
    problems = [
        Problem(
            "is 'metric', but there is no evaluation data: it would never move",
            f"{place}.interval",
            "state data.eval_sources or data.train_eval_split",
        )
        for place in metric_schedules(config)
    ]
    if problems:
        raise RecipeError(problems)


def _waits(config: Config) -> bool:
    from arctic_like.scheduler.base import SchedulerConfig

    return isinstance(config, SchedulerConfig) and config.interval == "metric"


def _configs(value: Any, place: str) -> Iterator[tuple[str, Config]]:
    if isinstance(value, Config):
        yield place, value
        for name in type(value).model_fields:
            yield from _configs(getattr(value, name), f"{place}.{name}" if place else name)
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from _configs(entry, f"{place}.{number}")
