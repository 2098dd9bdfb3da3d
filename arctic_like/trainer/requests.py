"""What signals, callbacks and a switch on the disk ask of a run.

All ranks learn of it in the exchange before a step, and do it at the step that is done then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.rewind import Rewind

STOP_REASONS = ("interrupt", "terminate", "kill_switch", "callback")
"""Why a run may stop, the most urgent first; what callbacks say for themselves counts as "callback"."""
WISHES = ("evaluation", "checkpoint", "best", "log")


class Requests:
    """This rank's wishes, and what became of all ranks'."""

    def __init__(self) -> None:
        self.wishes: set[str] = set()
        self.rewind: Rewind | None = None
        """To go back, at once: all ranks ask alike."""
        self.concluded = False
        """Whether the run was stopped because it has reached its goal."""

    def agree(self, trainer: Trainer, weight: float = 0.0) -> float:
        """The sum of a weight over all ranks, with what anyone asks for: granted, until nobody asks.
        Collective."""
        while True:
            wanted = _wanted(trainer)
            kind = wanted if wanted in STOP_REASONS or not wanted else "callback"
            saver = trainer.equipment.saver
            total, news, *asked = trainer.session.host.sum([
                weight, float(saver.news), *(float(reason == kind) for reason in STOP_REASONS),
                *(float(wish in self.wishes) for wish in WISHES),
            ])  # fmt: skip
            if news:
                with trainer.clock_stopped("checkpoint"):
                    saver.settle(trainer)
            stops, wishes = asked[: len(STOP_REASONS)], asked[len(STOP_REASONS) :]
            if any(wishes):
                self._grant(trainer, {w for w, n in zip(WISHES, wishes, strict=True) if n})
                continue
            for reason, count in zip(STOP_REASONS, stops, strict=True):
                if count and not trainer.progress.stopped:
                    self.stop(trainer, *_said(trainer, reason))
            return total

    def stop(self, trainer: Trainer, reason: str, concludes: bool = False) -> None:
        """End the run before the next step, on this rank as on all others."""
        trainer.progress.stopped, self.concluded = reason, concludes
        trainer.emit("on_stop_requested", reason)
        if reason in ("interrupt", "terminate"):
            trainer.emit("on_interrupt")

    def _grant(self, trainer: Trainer, wishes: set[str]) -> None:
        self.wishes -= wishes
        saver, step = trainer.equipment.saver, trainer.global_step
        with trainer.clock_stopped():
            if "evaluation" in wishes and trainer.evaluated_at != step:
                trainer.evaluate()
            if "log" in wishes and trainer.lines.last != step > 0:
                trainer.lines.write_step(trainer)
            for wish, how in (("best", "is_best"), ("checkpoint", "on_request")):
                if wish in wishes and saver.due(trainer, **{how: True}):
                    trainer.checkpoint()


def _wanted(trainer: Trainer) -> str:
    session = trainer.session
    if not session.requested and trainer.world.is_main:
        session.requested = session.external_stop(trainer.config.kill_switch_path)
    return session.requested


def _said(trainer: Trainer, reason: str) -> tuple[str, bool]:
    """A callback's own word for its reason, and whether it concludes the training: the first rank's."""
    if reason != "callback":
        return reason, False
    session = trainer.session
    mine = (session.requested, session.concludes) if session.requested else None
    said = [one for one in session.host.gather(mine) if one and one[0] not in STOP_REASONS[:-1]]
    return said[0] if said else (reason, False)
