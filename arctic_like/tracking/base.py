"""Trackers show a run's numbers to people; `metrics.jsonl` keeps them (metrics_file.py).

They live on rank 0 alone. One that fails, because a network does, never ends a run: `Guarded`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from arctic_like.config.base import PartConfig
from arctic_like.errors import RecipeError
from arctic_like.registry import Part


class TrackerConfig(PartConfig):
    """Base of all trackers' configs."""


class Tracker(Part, family="tracker"):
    """Receives what is logged. Every method may be left out; those here do nothing."""

    config_type: ClassVar[type[PartConfig]] = TrackerConfig

    def start(
        self,
        *,
        run_name: str,
        recipe: dict[str, Any],
        output_dir: Path,
        total_steps: int | None,
        state: dict[str, Any],
    ) -> None:
        """The run begins, or goes on where `state` was saved (empty for a new run).

        recipe: the resolved recipe as plain values. output_dir: the run directory.
        Raises RecipeError for what the user must mend first, a missing package above all.
        """

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of an optimizer step; names as in metrics.jsonl (`loss`, `eval/loss`, …)."""

    def text(self, step: int, name: str, value: str) -> None:
        """A text, a generated sample say."""

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """A table; each row has one value for each column."""

    def image(self, step: int, name: str, array: Any) -> None:
        """An image: numpy array (height, width) or (height, width, 3), uint8 or floats in 0…1."""

    def histogram(
        self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]
    ) -> None:
        """A distribution: so many values between two of the `len(counts) + 1` edges, which rise."""

    def state(self) -> dict[str, Any]:
        """What `start` needs to go on with the same run; plain values, kept in each checkpoint."""
        return {}

    def finish(self, exit_code: int) -> None:
        """The run has ended, with this exit code."""


class Guarded:
    """A tracker whose failures do not reach the run: the first is a warning, the rest is silence.

    One that could not start stays off. RecipeError passes: that is known before the first step.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.name = tracker.name
        self._on = True
        self._warned = False

    def start(self, **values: Any) -> None:
        """As `Tracker.start`."""
        self._on = self._safely(self.tracker.start, **values)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """As `Tracker.scalars`."""
        self._safely(self.tracker.scalars, step, values)

    def text(self, step: int, name: str, value: str) -> None:
        """As `Tracker.text`."""
        self._safely(self.tracker.text, step, name, value)

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """As `Tracker.table`."""
        self._safely(self.tracker.table, step, name, columns, rows)

    def image(self, step: int, name: str, array: Any) -> None:
        """As `Tracker.image`."""
        self._safely(self.tracker.image, step, name, array)

    def histogram(
        self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]
    ) -> None:
        """As `Tracker.histogram`."""
        self._safely(self.tracker.histogram, step, name, counts, edges)

    def state(self) -> dict[str, Any]:
        """As `Tracker.state`; empty where it failed."""
        kept: dict[str, Any] = {}
        self._safely(lambda: kept.update(self.tracker.state()))
        return kept

    def finish(self, exit_code: int) -> None:
        """As `Tracker.finish`."""
        self._safely(self.tracker.finish, exit_code)

    def _safely(self, method: Callable[..., Any], *values: Any, **named: Any) -> bool:
        """Call, unless the tracker is off; whether it went well."""
        if not self._on:
            return False
        try:
            method(*values, **named)
        except RecipeError:
            raise
        except Exception as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        from loguru import logger

        logger.warning(
            "tracker {} failed ({}: {}); the run goes on, metrics.jsonl has everything",
            self.name, type(error).__name__, error,
        )  # fmt: skip
