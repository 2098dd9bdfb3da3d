"""`metrics.jsonl`: one JSON object a line, the record of truth for every report.

A number stands there as Python's `repr` of it, so that a float read back is the same float. JSON
has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity" (which
`float()` and JavaScript's `Number()` read) and come back as floats from `read_metrics`.

A line is complete when it ends in a line break; a kill may leave one that does not, and it counts
as not written. A resume goes on from where the file stood at the checkpoint, so that no step stands
there twice. Written by rank 0 alone, which owns the run directory (`rundir.RunDirectory.lock`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_like.errors import RunError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Rewound:
    """What `MetricsFile.rewind` did."""

    exact: bool
    """The file fitted the checkpoint; if not, lines were chosen by their step."""
    dropped: int
    """Lines that were taken out."""


class MetricsFile:
    """Appends lines. Opens the file, with its folder, when it is made; a torn last line goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("ab")
        whole = _whole_lines(self.path.read_bytes())
        if whole != self._file.tell():
            self._file.truncate(whole)
            self._file.seek(0, os.SEEK_END)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line. Values: numbers (also numpy's), strings, booleans, None, lists, maps.

        The line has left the process when this returns; it is on the disk after `sync`.
        """
        self._file.write(_encode(values))
        self._file.flush()

    def sync(self) -> int:
        """Put all lines on the disk; returns the file's length in bytes, for the checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def rewind(self, offset: int | None, step: int) -> Rewound:
        """Go back to where the file stood when the checkpoint of `step` was saved.

        `offset` is what `sync` returned then. If the file does not fit it (shorter, edited, or the
        checkpoint knows none), the lines of steps up to `step` stay and the others go. Start over
        with `rewind(0, 0)`.
        """
        content = self.path.read_bytes()
        if offset is not None and _fits(content, offset, step):
            kept, exact = content[:offset], True
        else:
            kept, exact = _up_to(content, step), False
            if offset is not None:
                self._warn(step)
        if kept != content:
            self._replace(kept)
        return Rewound(exact=exact, dropped=content.count(b"\n") - kept.count(b"\n"))

    def _warn(self, step: int) -> None:
        from loguru import logger

        logger.warning(
            "{} is not as the checkpoint of step {step} left it; lines up to step {step} stay",
            self.path, step=step,
        )  # fmt: skip

    def _replace(self, content: bytes) -> None:
        """Swap the file's content at once: a kill leaves the old or the new one."""
        from arctic_like.rundir import write_atomically

        self._file.close()
        write_atomically(self.path, content)
        self._open()

    def close(self) -> None:
        """Put all lines on the disk and let go of the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file. Raises RunError naming a line that is not an object."""
    if not path.is_file():
        raise RunError(
            f"{path}: there is no such file; give the run directory of a run that started"
        )
    content = path.read_bytes()
    lines = []
    for number, line in enumerate(content[: _whole_lines(content)].splitlines(), start=1):
        values = _decode(line)
        if values is None:
            raise RunError(f"{path}:{number}: is not a JSON object; mend or remove the line")
        lines.append(values)
    return lines


def _encode(values: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(dict(values)), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """The same value in JSON's terms, non-finite numbers by name."""
    if isinstance(value, float):
        return _name_of(value) if not math.isfinite(value) else float(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())  # a numpy scalar
    return value  # json says what is wrong


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return {k: _number(v) for k, v in values.items()} if isinstance(values, dict) else None


def _number(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_number(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _number(inner) for key, inner in value.items()}
    return value


def _whole_lines(content: bytes) -> int:
    """Length of the part that consists of complete lines."""
    return content.rfind(b"\n") + 1


def _lines(content: bytes) -> Iterator[bytes]:
    """Complete lines, with their line breaks."""
    return iter(content[: _whole_lines(content)].splitlines(keepends=True))


def _step(line: bytes) -> float | None:
    step = (_decode(line) or {}).get("step")
    return step if isinstance(step, (int, float)) else None


def _fits(content: bytes, offset: int, step: int) -> bool:
    """Whether `content[:offset]` can be what stood there at `step`: whole lines of steps up to it,
    in order, and none of those steps behind it but lines of `step` itself (written after the save).
    """
    if offset > len(content) or (offset and content[offset - 1 : offset] != b"\n"):
        return False
    before = [_step(line) for line in _lines(content[:offset])]
    after = [_step(line) for line in _lines(content[offset:])]
    known = [s for s in before if s is not None]
    return (
        len(known) == len(before)
        and all(s <= step for s in known)
        and known == sorted(known)
        and all(s is None or s >= step for s in after)
    )


def _up_to(content: bytes, step: int) -> bytes:
    """The lines of steps up to `step`; lines that are no records go with the others."""
    return b"".join(
        line for line in _lines(content) if (at := _step(line)) is not None and at <= step
    )
