"""Where the time of a step goes: data, communication, forward, backward, optimizer and the rest.

Exactly one phase is under way at any time, so that the phases of a line add up to its step time. On a CPU
a change of phase reads the clock. On CUDA it records an event on the current stream: the phases are then
the device's time (a wait for data is the time that the device stood still for it), and nothing waits for
the device: events are read at the next line, which has waited for it already.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

STEP = ("data", "communication", "forward", "backward", "optimizer", "other")
"""What a step time is made of, in the order of the line."""
OUTSIDE = ("evaluation", "checkpoint", "stopped")
"""What happens while the clock of steps stands still; by the host's clock on any device."""
_MANY = 256
"""So many unread events are looked through for those that have passed; they are a few hundred bytes each."""


class Watch(Protocol):
    """Adds up the time between laps."""

    def lap(self, phase: str | None) -> None:
        """Count the time since the last lap to the phase that was under way, and begin another (None: one
        that is not counted)."""

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last `read`; the phase under way goes on."""


class HostWatch:
    """The clock of this process."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase: str | None = None
        self._since = clock()
        self._sums: dict[str, float] = {}

    def lap(self, phase: str | None) -> None:
        now = self._clock()
        if self._phase is not None:
            self._sums[self._phase] = self._sums.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def read(self) -> dict[str, float]:
        self.lap(self._phase)
        sums, self._sums = self._sums, {}
        return sums


class DeviceWatch:
    """Events on one stream of the device, whichever is current. `event` makes one
    (`torch.cuda.Event(enable_timing=True)`)."""

    def __init__(self, event: Callable[[], Any], stream: Any = None) -> None:
        self._event, self._stream = event, stream
        self._free: list[Any] = []
        self._laps: deque[tuple[str | None, Any]] = deque()  # phase, the event at its beginning
        self._sums: dict[str, float] = {}

    def lap(self, phase: str | None) -> None:
        event = self._free.pop() if self._free else self._event()
        event.record(self._stream)
        self._laps.append((phase, event))
        if len(self._laps) % _MANY == 0:
            self._add_up()

    def read(self) -> dict[str, float]:
        if self._laps:
            self.lap(self._laps[-1][0])
            self._laps[-1][1].synchronize()
        self._add_up()
        sums, self._sums = self._sums, {}
        return sums

    def _add_up(self) -> None:
        """Take in the laps whose end the device has passed; never waits."""
        while len(self._laps) > 1 and self._laps[1][1].query():
            phase, begin = self._laps.popleft()
            if phase is not None:
                seconds = begin.elapsed_time(self._laps[0][1]) / 1e3
                self._sums[phase] = self._sums.get(phase, 0.0) + seconds
            self._free.append(begin)


class Phases:
    """The phases of one run on this rank."""

    def __init__(self) -> None:
        self.current = "stopped"
        """The phase under way."""
        self.totals: dict[str, float] = {}
        """Seconds by phase since this process began to train, as far as they were read."""
        self._depth = 0
        self._watch: Watch = HostWatch()
        self._outside = HostWatch()

    def use(self, device: str) -> None:
        """Measure on this device (`cpu`, `cuda:0`)."""
        if device.startswith("cuda"):
            import torch

            self._watch = DeviceWatch(
                lambda: torch.cuda.Event(enable_timing=True),  # type: ignore[no-untyped-call]
                torch.cuda.current_stream(device),
            )

    def begin(self, phase: str) -> str:
        """A phase begins; returns the one that ends. Within one of `OUTSIDE` only another of those can."""
        before = self.current
        if phase == before or (before in OUTSIDE and phase in STEP):
            return before
        self._set(phase)
        return before

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens inside is this phase; afterwards the one before goes on."""
        before = self.begin(phase)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._set(before)

    def start(self) -> None:
        """Count anew: what has been counted of steps is forgotten."""
        if not self._depth:
            self._set("other")
        self._watch.read()

    def read(self, steps: int) -> dict[str, float]:
        """The values of a line: `time/<phase>`, seconds a step of the phases in `STEP`; and the whole time
        since the last line of evaluations and checkpoints, if there were any. Waits for the device."""
        counted, outside = self._watch.read(), self._outside.read()
        for phase, seconds in (*counted.items(), *outside.items()):
            self.totals[phase] = self.totals.get(phase, 0.0) + seconds
        line = {f"time/{phase}": counted.get(phase, 0.0) / max(steps, 1) for phase in STEP}
        return line | {
            f"time/{phase}": outside[phase] for phase in OUTSIDE[:-1] if outside.get(phase)
        }

    def summary(self) -> dict[str, float]:
        """Seconds by phase of the whole run in this process, with what no line has told yet."""
        self.read(1)
        return {p: self.totals[p] for p in (*STEP, *OUTSIDE[:-1]) if self.totals.get(p)}

    def _set(self, phase: str) -> None:
        if phase == self.current:
            return
        inside = phase in STEP
        if inside or self.current in STEP:
            self._watch.lap(phase if inside else None)
        if not inside or self.current in OUTSIDE:
            self._outside.lap(None if inside else phase)
        self.current = phase
