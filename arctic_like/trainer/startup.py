"""How long a run took from its command to its first step, and with what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

COMMAND_STARTED = "ARCTIC_STARTED"
"""When the command began, in seconds since 1970, for the processes that it starts."""


class StartUp:
    """Seconds of each part of the start, in their order. Begins with the command where there was one, and
    else where it is made."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.seconds: dict[str, float] = {}
        now = clock()
        began = os.environ.pop(COMMAND_STARTED, None)  # of the first run of a process alone
        self._began = min(float(began), now) if began else now
        if began:
            self.seconds["launch"] = now - self._began
        self._since = now

    def lap(self, name: str) -> None:
        """What took the time since the last lap. Of several learners, `critic.model` counts to `model`."""
        name, now = name.rpartition(".")[2], self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @property
    def total(self) -> float:
        """From the beginning to the last lap."""
        return self._since - self._began

    def sentence(self) -> str:
        """One line for the log; what took less than a twentieth of a second is summed up as `rest`."""
        shown = {name: s for name, s in self.seconds.items() if s >= 0.05 and name != "rest"}
        rest = self.total - sum(shown.values())
        shown |= {"rest": rest} if rest >= 0.05 else {}
        parts = [f"{name} {s:.1f}" for name, s in shown.items()]
        return f"first step {self.total:.1f} s after the start: {', '.join(parts)}"


def first_step_done(trainer: Trainer) -> None:
    """Say and keep how long the start took (rank zero; the others return)."""
    start_up = trainer.session.start_up
    start_up.lap("first step")
    if not trainer.world.is_main:
        return
    from loguru import logger

    logger.info(start_up.sentence())
    trainer.session.directory.note_start_up({"total": start_up.total, **start_up.seconds})
