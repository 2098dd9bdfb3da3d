"""What lies in the cache of prepared data, and its removal.

Only what `cache.py` lays out is looked at: `<kind>/<key>` and the files beside it. Whatever else is
found is *foreign*: shown, never touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arctic_like.data.cache import MARKER, VERSION

HASHES = "hashes"
"""Where `hashes.py` remembers the hashes of files: small, and no entries."""

State = Literal["complete", "preparing", "incomplete", "foreign"]

_KEY = re.compile(r"[0-9a-f]{32}")
_QUIET_SECONDS = 900.0
"""A folder that another machine did not touch for so long is nobody's."""
_BUSY = {errno.EAGAIN, errno.EACCES}


@dataclass(frozen=True)
class Entry:
    """One key of one kind.

    state: `preparing` while a process holds its lock, or one of another machine writes;
    `incomplete` is what a killed one left. size: bytes on disk, of everything that belongs to the
    key. made, used: seconds since 1970. paths: what is removed with it.
    """

    kind: str
    key: str
    state: State
    size: int
    made: float
    used: float
    facts: dict[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """ "documents/3f2a…"."""
        return f"{self.kind}/{self.key}"

    @property
    def version(self) -> int | None:
        """The format that it was written in; None where it does not say."""
        stated = self.facts.get("version")
        return stated if isinstance(stated, int) else None

    @property
    def is_old(self) -> bool:
        """Whether another version wrote it, which no run of this one reads."""
        return self.state == "complete" and self.version != VERSION

    @property
    def title(self) -> str:
        """What it was made from, as far as it says."""
        sources = self.facts.get("sources") or []
        return str(
            self.facts.get("source") or ", ".join(str(one.get("title", "")) for one in sources)
        )


def entries(root: Path) -> list[Entry]:
    """All entries, by kind, the largest first. Reads names, sizes and markers, no data."""
    if not root.is_dir():
        return []
    found = [
        entry
        for folder in sorted(root.iterdir())
        if folder.is_dir() and folder.name != HASHES
        for entry in _of_kind(folder)
    ]
    return sorted(found, key=lambda entry: (entry.kind, -entry.size, entry.key))


def entry_at(path: Path) -> Entry:
    """The entry whose folder is `path`. Raises FileNotFoundError where there is none."""
    found = _entry(path.parent, path.name, sorted(_beside(path)))
    if found is None:
        raise FileNotFoundError(path)
    return found


def complete(root: Path) -> set[Path]:
    """The folders of all complete entries."""
    return {marker.parent for marker in root.glob(f"*/*/{MARKER}")}


def _of_kind(folder: Path) -> Iterator[Entry]:
    beside: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        key = path.name.partition(".")[0]
        if _KEY.fullmatch(key):
            beside.setdefault(key, []).append(path)
        elif path.is_dir():
            yield Entry(folder.name, path.name, "foreign", _size(path), *_times(path))
    for key, paths in beside.items():
        entry = _entry(folder, key, paths)
        if entry is not None:
            yield entry


def _entry(folder: Path, key: str, paths: list[Path]) -> Entry | None:
    """None where a lock is all there is."""
    own = folder / key
    paths = [path for path in paths if path.suffix != ".lock"]
    facts = _facts(own)
    busy = facts is None and (_held(_lock_of(own)) or any(map(_is_remote_work, paths)))
    if not paths and not busy:
        return None
    state: State = "complete" if facts is not None else "preparing" if busy else "incomplete"
    made, used = _times(own / MARKER if facts is not None else paths[0] if paths else folder)
    if facts is not None:
        with suppress(OSError):
            used = own.stat().st_mtime  # set at every use, see `cache.obtain`
    size = sum(_size(path) for path in paths)
    return Entry(folder.name, key, state, size, made, used, facts or {}, tuple(paths))


def _beside(entry: Path) -> Iterator[Path]:
    """The entry and what lies beside it under its key."""
    for path in entry.parent.glob(f"{entry.name}*"):
        if path.name.partition(".")[0] == entry.name:
            yield path


def _facts(entry: Path) -> dict[str, Any] | None:
    """The marker's content; None where there is none, or none that can be read."""
    try:
        content = json.loads((entry / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _is_remote_work(path: Path) -> bool:
    """Whether a process of another machine may be at work in a folder: many file systems keep locks
    to one machine, so that its own says nothing here."""
    host = path.name.partition(".tmp-")[2].rpartition("-")[0]
    if not host or host == socket.gethostname():
        return False
    newest = 0.0
    with suppress(OSError):
        newest = max(one.stat().st_mtime for one in [path, *path.iterdir()])
    return time.time() - newest < _QUIET_SECONDS


def _times(path: Path) -> tuple[float, float]:
    try:
        changed = path.stat().st_mtime
    except OSError:
        return 0.0, 0.0
    return changed, changed


def _size(path: Path) -> int:
    """Bytes that a file or a folder takes on disk; what vanishes meanwhile takes none."""
    total = 0
    inside = [path, *path.rglob("*")] if path.is_dir() else [path]
    for one in inside:
        with suppress(OSError):
            total += one.lstat().st_blocks * 512
    return total


def _lock_of(entry: Path) -> Path:
    return entry.with_name(entry.name + ".lock")


def _held(lock: Path) -> bool:
    """Whether a process holds a lock. Takes it for a moment, and only if it is there."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _BUSY
    finally:
        os.close(descriptor)
    return False


def remove(root: Path, entry: Entry) -> bool:
    """Remove an entry and what lies beside it; false if a process is preparing it.

    The lock is held meanwhile, and its file stays: a process that waits for it has it open.
    """
    if entry.state == "foreign":
        raise ValueError(f"{entry.name} is none of the cache's")
    own = root / entry.kind / entry.key
    with _locked(_lock_of(own)) as taken:
        if not taken or any(map(_is_remote_work, _beside(own))):
            return False
        # first what makes it an entry, so that nobody takes what is half gone for whole
        with suppress(FileNotFoundError):
            (own / MARKER).unlink()
        for path in entry.paths:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    return True


@contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                yield False
                return
        yield True
