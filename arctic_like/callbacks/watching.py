"""What callbacks that watch an evaluation metric share: whose it is, which way is better, by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from arctic_like.callbacks.base import CallbackConfig
from arctic_like.config.delta import Delta
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

Direction = Literal["min", "max"]


class WatchConfig(CallbackConfig):
    """Which metric, and what an improvement of it is."""

    priority: int = 100
    """Lower is called earlier; late by default, so that what other callbacks measured is there."""

    metric: str = ""
    """The evaluation metric, as it stands in `metrics.jsonl` (`eval/` may be left out);
    `metric_monitor` unless given."""

    mode: Literal["auto", "min", "max"] = "auto"
    """Whether lower (`min`) or higher (`max`) is better; `auto` goes by the metric's name."""

    min_delta: Delta = Delta()
    """A change by no more than this is none: `0.01` in the metric's unit, or `1%` of the best's size."""


class Watch:
    """One metric, followed over the evaluations. The same on all ranks."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._seen = False
        self.name = config.metric
        self.direction: Direction = "min"

    def begin(self, trainer: Trainer) -> None:
        """Find out whose metric it is. Raises RecipeError where no evaluation would ever be made."""
        monitor = trainer.config.metric_monitor
        self.name = self._config.metric or monitor.metric
        mode = self._config.mode
        self.direction = monitor.direction(self.name) if mode == "auto" else mode
        if not trainer.config.eval_interval:
            raise RecipeError(
                Problem(
                    f"is off, and {self._config.type} waits for evaluations",
                    place="eval_interval",
                    hint=f"state eval_interval, such as `1 epoch`, or take {self._config.type} out of "
                    "`callbacks`",
                )
            )

    def value(self, trainer: Trainer, results: Mapping[str, float]) -> float | None:
        """The metric in an evaluation; rank zero's, as a callback may measure there alone. Collective.

        None where this evaluation lacks it. Raises RunError where it never was there, on all ranks.
        """
        mine = results.get(self.name, results.get(f"eval/{self.name}"))
        measured = ", ".join(results) or "nothing"
        value, measured = trainer.session.host.from_main((mine, measured))
        if value is None and not self._seen:
            raise RunError(
                f"{self._config.type} watches {self.name!r}, but the evaluation measured {measured}\n"
                f"    name one of these in its `metric` or in metric_monitor"
            )
        self._seen = True
        return None if value is None else float(value)

    def better(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than `best` by more than `min_delta`. NaN never is."""
        return improved(value, best, self.direction, self._config.min_delta)


def improved(value: float, best: float | None, direction: Direction, delta: Delta) -> bool:
    """value < best - delta(|best|), or > best + delta(|best|) for "max".

    Anything but NaN is better than nothing and than NaN.
    """
    if math.isnan(value):
        return False
    if best is None or math.isnan(best):
        return True
    gain = best - value if direction == "min" else value - best
    return gain > delta.at(best) if delta else gain > 0


def shown(value: Any) -> str:
    """A number for a sentence."""
    return "none" if value is None else f"{value:.6g}"
