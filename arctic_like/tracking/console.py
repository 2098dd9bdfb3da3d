"""The console: a live display in a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.tracking.base import Tracker, TrackerConfig

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

WIDTH = 80
_EVALUATION = "eval/"
_RATE = "_per_second"
_PHASE = "time/"
_BETWEEN_STEPS = ("time/evaluation", "time/checkpoint")


class ConsoleConfig(TrackerConfig):
    """The progress display. It is there unless a recipe switches it off."""

    enabled: bool = True
    """Show progress; warnings and the summary are shown in any case."""

    refresh_per_second: float = 2.0
    """How often the live display is drawn again. Each time costs about a millisecond."""


@dataclass
class Progress:
    """What is known of the run's progress; a small model of the display, without any drawing."""

    total: int | None
    clock: Callable[[], float] = time.monotonic
    step: int = 0
    train: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    _first: tuple[int, float] | None = None

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Take a line's numbers in."""
        self.step = max(self.step, step)
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
        evaluation = {k: v for k, v in numbers.items() if k.startswith(_EVALUATION)}
        self.evaluation.update(evaluation)
        if "loss" in numbers:
            self.train = numbers
            self._first = self._first or (step, self.clock())

    def seconds_left(self) -> float | None:
        """By the pace since the first step that was seen, evaluations and checkpoints included."""
        if self.total is None or self._first is None or self.step <= self._first[0]:
            return None
        begun, at = self._first
        return (self.clock() - at) / (self.step - begun) * max(0, self.total - self.step)

    def counted(self) -> str:
        """`120/1000`, or `120` where the end is not known."""
        return f"{self.step}/{self.total}" if self.total else str(self.step)

    def figures(self) -> list[str]:
        """Loss, learning rate and speed, as they are shown."""
        shown = []
        if "loss" in self.train:
            shown.append(f"loss {self.train['loss']:.4f}")
        if "learning_rate" in self.train:
            shown.append(f"lr {self.train['learning_rate']:.2e}")
        for name, rate in self.train.items():
            if name.endswith(_RATE) and "/" not in name:
                shown.append(f"{_short(rate)} {name.removesuffix(_RATE)}/s")
        return shown

    def phases(self) -> list[str]:
        """The share of each phase in a step that has at least a fiftieth: `forward 31%`."""
        return [f"{name} {share:.0%}" for name, share in self._shares().items() if share >= 0.02]

    def delays(self) -> list[str]:
        """The phases beside forward and backward that take a tenth of a step or more: `data 34%`."""
        return [
            f"{name} {share:.0%}"
            for name, share in self._shares().items()
            if share >= 0.1 and name not in ("forward", "backward")
        ]

    def _shares(self) -> dict[str, float]:
        step = self.train.get("step_time", 0.0)
        return {
            name.removeprefix(_PHASE): seconds / step
            for name, seconds in self.train.items()
            if name.startswith(_PHASE) and step > 0 and name not in _BETWEEN_STEPS
        }

    def time_left(self) -> list[str]:
        """`1:23:45 left`, or nothing while it is not known."""
        left = self.seconds_left()
        return [] if left is None else [f"{_clock(left)} left"]

    def results(self, values: Mapping[str, float] | None = None) -> list[str]:
        """Evaluation values, the last ones unless given."""
        values = self.evaluation if values is None else values
        return [f"{name} {value:.4g}" for name, value in values.items()]


class ConsoleTracker(Tracker):
    """Shows step, loss, learning rate, speed, time left and the last evaluation."""

    name = "console"
    config_type = ConsoleConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._display: _Live | _Lines | _Silent = _Silent()

    def start(
        self,
        *,
        run_name: str,
        recipe: dict[str, Any],
        output_dir: Path,
        total_steps: int | None,
        state: dict[str, Any],
    ) -> None:
        """Show that the run begins."""
        from arctic_like.logs import console

        if not self.config.enabled:
            return
        progress = Progress(total_steps)
        if console().is_terminal and not console().is_dumb_terminal:
            self._display = _Live(console(), progress, self.config.refresh_per_second)
        else:
            self._display = _Lines(console(), progress)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the numbers in; a live display draws them later, in a thread of its own."""
        self._display.update(step, values)

    def text(self, step: int, name: str, value: str) -> None:
        """Printed above the progress display."""
        self._display.print(f"step {step}  {name}: {value}")

    def finish(self, exit_code: int) -> None:
        """Leave the last state on the screen."""
        self._display.close()


class _Silent:
    """The display of a recipe that wants none."""

    def update(self, step: int, values: Mapping[str, Any]) -> None: ...

    def print(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Live:
    """A few lines at the bottom of a terminal, redrawn in place; messages appear above them."""

    def __init__(self, console: Console, progress: Progress, per_second: float) -> None:
        from rich.live import Live

        self._progress = progress
        self._console = console
        self._live: Live = Live(
            self, console=console, refresh_per_second=per_second, redirect_stderr=False
        )
        self._live.start()

    def __rich__(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        progress = self._progress
        bar = ProgressBar(total=progress.total or None, completed=progress.step, width=28)
        head = Table.grid(padding=(0, 2))
        head.add_row(bar, f"step {progress.counted()}", *progress.time_left())
        lines = Table.grid()
        lines.add_row(head)
        lines.add_row(Text("  ".join([*progress.figures(), *progress.results()])))
        if phases := progress.phases():
            lines.add_row(Text("  ".join(["time:", *phases]), style="dim"))
        return lines

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        self._progress.update(step, values)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


class _Lines:
    """Plain lines for pipes and files: about every 5 % of the run, and at least every 10 s at
    first, later less often (a fiftieth of the time so far: a day's run has some 300 lines).
    """

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._begun = self._last_time = progress.clock()
        self._last_step: int | None = None

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        progress = self._progress
        progress.update(step, values)
        new = {k: v for k, v in values.items() if k.startswith(_EVALUATION)}
        if "loss" in values and self._due():
            self._line()
        if new:
            self._wrap(f"step {progress.counted()}", progress.results(new))

    def _due(self) -> bool:
        progress, now = self._progress, self._progress.clock()
        if self._last_step is None or progress.step == progress.total:
            return True
        share = 0.05 * (progress.total or 0)
        by_step = share > 0 and progress.step - self._last_step >= share
        waited = now - self._last_time
        return by_step or waited >= max(10.0, 0.02 * (now - self._begun))

    def _line(self) -> None:
        progress = self._progress
        self._last_step, self._last_time = progress.step, progress.clock()
        figures = [*progress.figures(), *progress.delays(), *progress.time_left()]
        self._wrap(f"step {progress.counted()}", figures)

    def _wrap(self, head: str, figures: list[str]) -> None:
        """The figures behind `head`, on as many lines of 80 columns as they need."""
        line = head
        for figure in figures:
            if len(line) + 2 + len(figure) > WIDTH and line.strip():
                self.print(line)
                line = " " * len(head)
            line += "  " + figure
        self.print(line)

    def print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._last_step is not None and self._last_step != self._progress.step:
            self._line()


def _short(number: float) -> str:
    """1234567 → 1.23M: three digits are enough to see a speed."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
