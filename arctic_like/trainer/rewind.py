"""Back to the last good checkpoint, in the process, past the batches that spoiled what followed.

What was decided is on the disk (`rewinds.json` beside the checkpoints) before anything is loaded, and in
every later checkpoint: a run that is killed and resumed passes over the same batches, and is the run that
was not killed. A batch that is passed over is no step: the position moves, `global_step` and the schedule do
not. Steps that are done again replace their lines in `metrics.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.checkpoint.layout import complete_checkpoints, step_of
from arctic_like.checkpoint.publish import supersede_after
from arctic_like.errors import CheckpointError, RunError

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

RECORD = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """What a callback asked for. before: the first step that may be spoilt. skip: positions of the global
    batches to pass over. most: how often the run may go back to one checkpoint."""

    before: int
    skip: tuple[int, ...]
    reason: str
    most: int


def checkpoint_before(trainer: Trainer, step: int) -> Path | None:
    """The newest complete checkpoint of a step before `step`, by rank zero's file system. Collective."""
    saver, host = trainer.equipment.saver, trainer.session.host
    saver.settle(trainer)
    engine = saver.resumable_engine()
    found: Path | None = None
    if engine is not None and trainer.world.is_main:
        older = [p for p in complete_checkpoints(saver.folder(engine)) if (step_of(p) or 0) < step]
        found = older[-1] if older else None
    return host.from_main(found)


def go_back(trainer: Trainer, asked: Rewind) -> None:
    """Load the checkpoint before `asked.before` and remember what to pass over. Collective.

    Raises RunError where the run went back to it too often, CheckpointError where there is none.
    """
    from loguru import logger

    target = checkpoint_before(trainer, asked.before)
    if target is None:
        raise CheckpointError(f"{asked.reason}; no checkpoint of a step before it was saved")
    skipped = sorted({*trainer.progress.skipped, *asked.skip})
    rewinds = dict(trainer.progress.rewinds)
    rewinds[target.name] = rewinds.get(target.name, 0) + 1
    if rewinds[target.name] > asked.most:
        raise RunError(
            f"{asked.reason}, and the run went back to {target.name} {asked.most} times already\n"
            f"    Nothing was saved after it. The batches at positions {_shown(skipped)} were passed over.\n"
            "    Try a lower optimizer.learning_rate, or look at the data there."
        )
    logger.warning(
        f"{asked.reason}: going back to {target.name}"
        + (f", past the batches at positions {_shown(asked.skip)}" if asked.skip else "")
    )
    trainer.session.host.raise_together(_decide(trainer, target, skipped, rewinds))
    saved = trainer.equipment.saver.load(trainer, target)
    trainer.progress.skipped, trainer.progress.rewinds = skipped, rewinds
    trainer.equipment.recorder.rewind(saved["metrics"])
    trainer.emit("on_checkpoint_loaded", target)


def _decide(
    trainer: Trainer, target: Path, skipped: list[int], rewinds: dict[str, int]
) -> BaseException | None:
    """Rank zero: put the decision on the disk, set aside what is newer than `target`."""
    from arctic_like.rundir import write_atomically

    if not trainer.world.is_main:
        return None
    try:
        text = json.dumps({"skipped": skipped, "rewinds": rewinds}, indent=1) + "\n"
        write_atomically(target.parent / RECORD, text)
        supersede_after(target)
    except OSError as problem:
        return CheckpointError(f"the run cannot go back to {target}: {problem}")
    return None


def remember(trainer: Trainer) -> None:
    """At a start: what a run that is resumed had decided to pass over; nothing for a new one. Collective."""
    saver, host = trainer.equipment.saver, trainer.session.host
    engine = saver.resumable_engine()
    if engine is None:
        return
    record: dict[str, Any] = {}
    if trainer.world.is_main:
        path = saver.folder(engine) / RECORD
        if trainer.session.resume is None:
            path.unlink(missing_ok=True)
        else:
            record = _read(path)
    record = host.from_main(record)
    progress = trainer.progress
    progress.skipped = sorted({*progress.skipped, *record.get("skipped", [])})
    for name, count in record.get("rewinds", {}).items():
        progress.rewinds[name] = max(count, progress.rewinds.get(name, 0))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem}\n"
            "    it says which batches the run passes over; remove it to meet them again"
        ) from problem


def _shown(positions: Iterable[int]) -> str:
    numbers = [str(position) for position in positions]
    return ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
