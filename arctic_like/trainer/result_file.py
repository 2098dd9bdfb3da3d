"""`result.json`: what a run came to, in the run directory at every end, for searches over runs.

Plain JSON: an infinite number stands there as `1e999`, which parses to infinity everywhere; what is not a
number is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import NonFiniteError
from arctic_like.rundir import write_atomically

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.progress import Result

NAME = "result.json"
_INFINITY = "\0infinity\0"


def write_result(
    result: Result, *, error: str = "", seconds: Mapping[str, float] | None = None
) -> None:
    """Write `result.json` (rank zero). error: what ended the run, if something did. seconds: the time of
    each phase since this process began to train."""
    content = {
        "steps": result.steps,
        "stop_reason": result.stop_reason,
        "complete": result.complete,
        "final_loss": result.final_loss,
        "metrics": result.metrics,
        "best": result.best,
        "checkpoint": result.checkpoint and str(result.checkpoint),
        "exports": [str(path) for path in result.exports],
        "seconds": dict(seconds or {}),
        **({"error": error} if error else {}),
    }
    write_atomically(result.output_dir / NAME, as_json(content))


def failed(result: Result, error: BaseException) -> Result:
    """The result of a run that ended with an error: its final loss is infinite."""
    reason = "non_finite" if isinstance(error, NonFiniteError) else "error"
    return replace(result, stop_reason=reason, complete=False, final_loss=math.inf)


def leave_result(trainer: Trainer, result: Result) -> None:
    """At the end of a run."""
    if trainer.world.is_main:
        write_result(result, seconds=trainer.phases.summary())


def leave_failure(trainer: Trainer, error: BaseException) -> None:
    """At an end with an error, where the run had begun."""
    if getattr(trainer, "equipment", None) is None or not trainer.world.is_main:
        return
    text = str(error).splitlines()
    write_result(
        failed(trainer.result(), error),
        error=f"{type(error).__name__}: {text[0]}" if text else type(error).__name__,
    )


def remove_result(folder: Path) -> None:
    """A run that begins, or goes on, has not come to anything yet."""
    (folder / NAME).unlink(missing_ok=True)


def as_json(content: Any) -> str:
    """JSON text of plain values."""
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    quoted = json.dumps(_INFINITY)
    minus = json.dumps("-" + _INFINITY)
    return text.replace(minus, "-1e999").replace(quoted, "1e999") + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            return _INFINITY if value > 0 else "-" + _INFINITY
        return value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
