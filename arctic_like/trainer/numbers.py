"""The numbers that a run remembers: last and best values, the monitored metric, the epochs' records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from arctic_like.errors import RunError
from arctic_like.trainer.config import MetricMonitor

EVALUATION = ("eval/", "test/")


class Numbers:
    """Filled by every line that the run writes; part of every checkpoint."""

    def __init__(self, monitor: MetricMonitor) -> None:
        self.monitor = monitor
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.evaluations: dict[str, tuple[float, float, int]] = {}
        """Evaluation metric → its first value, its last, and how often it was measured."""
        self.history: list[dict[str, float]] = []
        """A record for each epoch: `epoch`, `step`, mean train loss, learning rate, evaluation values."""
        self.measured: tuple[int, float | None] = (-1, None)
        """The step of the last evaluation, and what it measured of the monitored metric."""

    def evaluated(self, step: int, results: Mapping[str, float]) -> bool:
        """Take in an evaluation; whether the monitored metric is better than ever before."""
        names = [n for n in self._names() if n in results]
        value = float(results[names[0]]) if names else None
        before = next((self.best[n] for n in self._names() if n in self.best), None)
        self.measured = (step, value)
        self.take_in(results)
        if value is None or not math.isfinite(value):
            return False
        return before is None or self.better(self.monitor.metric, value, before)

    def value_at(self, step: int) -> float | None:
        """The monitored metric of the weights of `step`; None where it was not measured of these."""
        return self.measured[1] if self.measured[0] == step else None

    def _names(self) -> tuple[str, str]:
        return (self.monitor.metric, f"eval/{self.monitor.metric}")

    def take_in(self, values: Mapping[str, Any]) -> None:
        """Remember what a line says."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
        self.last.update(numbers)
        for name, value in numbers.items():
            if not name.startswith(EVALUATION):
                continue
            have = self.best.get(name)
            if have is None or self.better(name, value, have):
                self.best[name] = value
            first, _, count = self.evaluations.get(name, (value, value, 0))
            self.evaluations[name] = (first, value, count + 1)

    def better(self, name: str, value: float, than: float) -> bool:
        """Whether a metric improved; a NaN never is better, and anything is better than NaN."""
        if math.isnan(value):
            return False
        if math.isnan(than):
            return True
        return value < than if self.monitor.direction(name) == "min" else value > than

    def monitored(self, results: Mapping[str, float], *, what: str = "metric_monitor") -> float:
        """The monitored metric's value in `results`. Raises RunError naming what was measured."""
        return pick(results, self.monitor.metric, what=what)

    def final_loss(self) -> float:
        """What a search over runs ranks by: the monitored metric's last value, else the last train
        loss; infinite where nothing was measured or the loss was not finite."""
        for name in (*self._names(), "eval/loss", "epoch_train_loss", "loss"):
            if name in self.last:
                value = self.last[name]
                return value if math.isfinite(value) else math.inf
        return math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"metrics": self.last, "best": self.best, "evaluations": self.evaluations,
                "history": self.history, "measured": self.measured}  # fmt: skip

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self.last, self.best = dict(saved["metrics"]), dict(saved["best"])
        self.evaluations = {k: tuple(v) for k, v in saved["evaluations"].items()}
        self.history = [dict(record) for record in saved.get("history", [])]
        step, value = saved.get("measured", (-1, None))
        self.measured = (step, value)


def pick(results: Mapping[str, float], metric: str, *, what: str) -> float:
    """`results[metric]`, also where the recipe leaves `eval/` out. Raises RunError naming what was
    measured."""
    for name in (metric, f"eval/{metric}"):
        if name in results:
            return float(results[name])
    have = ", ".join(results) or "nothing"
    raise RunError(f"{what} names {metric!r}, but the evaluation measured {have}")
