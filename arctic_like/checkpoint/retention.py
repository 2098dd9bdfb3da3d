"""Which checkpoints stay: the last, the best by the monitored metric, milestones. Numbers decide, not names.

A checkpoint holds the metric's value of its own weights (`run.json`), so what stays is decided alike
before and after a resume. The newest one always stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from arctic_like.checkpoint.layout import BEST, RUN_STATE, complete_checkpoints, step_of

MONITORED = "monitored"
"""The key in `run.json`."""

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class Monitored:
    """The monitored metric as a checkpoint records it.

    value: measured of these very weights; None where no evaluation was made at this step, or where
    it is not finite, which never is best.
    """

    metric: str = ""
    mode: Direction = "min"
    value: float | None = None

    @classmethod
    def of(cls, metric: str, mode: Direction, value: float | None) -> Monitored:
        """The same, with a value that is not finite left out."""
        finite = value is not None and math.isfinite(value)
        return cls(metric, mode, value if finite else None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `run.json`."""
        return asdict(self)


def recorded(folder: Path) -> Monitored | None:
    """What a checkpoint's or an export's `run.json` says of the metric; None where it says nothing."""
    try:
        found = json.loads((folder / RUN_STATE).read_text())[MONITORED]
        return Monitored(str(found["metric"]), found["mode"], found["value"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def values_of(folders: Iterable[Path], metric: str) -> dict[int, float | None]:
    """Step → recorded value of `metric` (None: none) of some `step-N` folders."""
    values: dict[int, float | None] = {}
    for folder in folders:
        step, found = step_of(folder), recorded(folder)
        if step is not None:
            values[step] = found.value if found is not None and found.metric == metric else None
    return values


def ranked(values: Mapping[int, float | None], mode: Direction) -> list[int]:
    """The steps that have a value, the best first; of equal ones the earliest."""
    sign = 1.0 if mode == "min" else -1.0
    known = {step: v for step, v in values.items() if v is not None and math.isfinite(v)}
    return sorted(known, key=lambda step: (sign * known[step], step))


def milestones(steps: Iterable[int], period: Fraction | int) -> set[int]:
    """Of the saved steps, the first at or after each multiple of `period` (in steps); 0: none.

    Those that stay do not change as others go: the first of its stretch is still the first.
    """
    found: dict[int, int] = {}
    for step in sorted(steps):
        if period > 0 and step >= period:
            found.setdefault(int(step // period), step)
    return set(found.values())


@dataclass(frozen=True)
class Retention:
    """How many stay. last: None keeps all. period: steps between milestones, 0 for none."""

    last: int | None = None
    best: int = 1
    period: Fraction = Fraction(0)

    def kept(self, values: Mapping[int, float | None], mode: Direction) -> set[int]:
        """The steps that stay, of all saved ones with their values. The highest is always among them."""
        steps = sorted(values)
        if self.last is None:
            return set(steps)
        newest = steps[-max(self.last, 1) :]
        return {*newest, *ranked(values, mode)[: self.best], *milestones(steps, self.period)}


def best_checkpoint(checkpoints: Path) -> Path | None:
    """The best complete checkpoint by the metric that the newest one records, whatever `best` says."""
    complete = complete_checkpoints(checkpoints)
    found = [one for path in complete if (one := recorded(path)) is not None]
    return best_of(complete, found[-1]) if found else None


def best_of(folders: Iterable[Path], by: Monitored) -> Path | None:
    """The best of some `step-N` folders by a metric and its direction; None where none has a value."""
    named = {step_of(folder): folder for folder in folders}
    order = ranked(values_of(named.values(), by.metric), by.mode)
    return named[order[0]] if order else None


def named_best(checkpoints: Path) -> str:
    """What the pointer `best` says; empty where there is none."""
    try:
        return (checkpoints / BEST).read_text().strip()
    except OSError:
        return ""
