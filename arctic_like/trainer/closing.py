"""What a run leaves on the screen when it is over: results, where they lie, what to type next."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from arctic_like.tracking.summary import SummaryRow
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.progress import Result


def show_end(trainer: Trainer, result: Result) -> None:
    """Print the table and the next commands (rank zero)."""
    from arctic_like.tracking.summary import show_summary

    # a judge of answers has a tokenizer too
    speaks = trainer.tokenizer is not None and hasattr(trainer.module, "generate")
    show_summary(
        rows=summary_rows(trainer),
        run_directory=result.output_dir,
        next_commands=next_commands(result, speaks=speaks),
    )


def summary_rows(trainer: Trainer) -> list[SummaryRow]:
    """First and last value of every evaluation metric, and what callbacks have to say.

    Where only one evaluation was made it stands as the last.
    """
    from arctic_like.tracking.summary import SummaryRow

    rows = [
        SummaryRow(*row)
        for callback in trainer.equipment.callbacks.all
        for row in callback.summary()
    ]
    told = {row.label for row in rows}
    for name, (first, last, count) in trainer.evaluations().items():
        label = name.removeprefix("eval/")
        if label not in told:
            rows.append(SummaryRow(label, first if count > 1 else None, last))
    return rows


def next_commands(result: Result, *, speaks: bool = True) -> list[str]:
    """What a user would want to do with this run. speaks: whether it is a language model."""
    run = shlex.quote(_shortest(result.output_dir))
    if not result.complete:
        return [f"arctic-train resume {run}"] if result.checkpoint else []
    if not speaks:
        return []
    if result.exports:
        return [f"arctic-train chat {run}"]
    if result.checkpoint:
        return [f"arctic-train chat {run}", f"arctic-train export {run} OUT"]
    return []


def _shortest(path: Path) -> str:
    from pathlib import Path as Here

    try:
        return str(path.relative_to(Here.cwd()))
    except ValueError:
        return str(path)
