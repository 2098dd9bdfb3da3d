"""Content hashes of files, remembered as long as nothing says that a file has changed.

    with remembered(root, verify=False) as hashes:   # file_hash looks here, and notes what it reads
        key = source.content_key()
        …
        hashes.refuse_changes()                      # what was hashed is what was read since

One small file for each path, `<root>/hashes/<xxh3 of the path>.json`, so that several nodes may
share the folder. The identity of a file is size, inode, mtime and ctime: the last also changes where
something sets the mtime back (`rsync --times --inplace`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

from arctic_like.errors import RunError

_FRESH_SECONDS = 2.0
"""A file may change twice within one tick of its file system's clock (2 s on FAT); what has changed
just now is not remembered."""

Identity = list[int]
"""Size, inode, mtime and ctime in ns."""


@dataclass(frozen=True)
class Content:
    """What is remembered of a file: its hash, and its lines, from which progress is told."""

    xxh3_128: str
    lines: int


class Hashes:
    """Remembered hashes. verify: read every file again, and remember that."""

    def __init__(self, folder: Path, *, verify: bool) -> None:
        self._folder = folder
        self._verify = verify
        self._seen: dict[Path, Identity] = {}
        self._lines: dict[Path, int] = {}

    def of(self, path: Path) -> str:
        """A file's hash, remembered or read."""
        path = Path(os.path.abspath(path))
        before = _identity(path)
        self._seen[path] = before
        place = self._place(path)
        known = None if self._verify else _recall(place, path, before)
        if known is None:
            known = read_through(path)
            newest = max(before[2:]) / 1e9
            if _identity(path) == before and time.time() - newest > _FRESH_SECONDS:
                content = {"path": str(path), "identity": before, **asdict(known)}
                self._remember(place, content)
        self._lines[path] = known.lines
        return known.xxh3_128

    def lines(self, path: Path) -> int | None:
        """Lines of a file that was asked for before."""
        return self._lines.get(Path(os.path.abspath(path)))

    def refuse_changes(self) -> None:
        """Raise RunError if a file is no longer what was hashed."""
        for path, before in self._seen.items():
            try:
                same = _identity(path) == before
            except OSError:
                same = False
            if not same:
                raise RunError(
                    f"{path} was changed while it was prepared\n    start again when it is whole"
                )

    def forget_seen(self) -> None:
        """Begin anew with what `refuse_changes` looks at."""
        self._seen.clear()

    def _place(self, path: Path) -> Path:
        import xxhash

        return self._folder / f"{xxhash.xxh3_64_hexdigest(os.fsencode(path))}.json"

    def _remember(self, place: Path, content: dict[str, object]) -> None:
        aside = place.with_name(f"{place.name}.{os.uname().nodename}-{os.getpid()}")
        with suppress(OSError):  # a cache that one may only read
            self._folder.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(content))
            aside.replace(place)


_active: ContextVar[Hashes | None] = ContextVar("hashes", default=None)


@contextmanager
def remembered(root: Path, *, verify: bool) -> Iterator[Hashes]:
    """`file_hash` uses the hashes that are remembered in a cache folder."""
    hashes = Hashes(root / "hashes", verify=verify)
    token = _active.set(hashes)
    try:
        yield hashes
    finally:
        _active.reset(token)


def file_hash(path: Path) -> str:
    """xxh3 (128 bits) of a file's content; within `remembered` not read again if it is known."""
    hashes = _active.get()
    return read_through(path).xxh3_128 if hashes is None else hashes.of(path)


def line_count(path: Path) -> int | None:
    """Within `remembered`: the lines of a file whose hash was asked for."""
    hashes = _active.get()
    return None if hashes is None else hashes.lines(path)


def read_through(path: Path) -> Content:
    """What a file holds, read in pieces."""
    import xxhash

    digest, lines, last = xxhash.xxh3_128(), 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return Content(digest.hexdigest(), lines + (last != b"\n"))


def refuse_changes() -> None:
    """Within `remembered`: raise RunError if a file is no longer what was hashed."""
    if hashes := _active.get():
        hashes.refuse_changes()


def forget_seen() -> None:
    """Within `remembered`: what is hashed from here on is what `refuse_changes` looks at."""
    if hashes := _active.get():
        hashes.forget_seen()


def _identity(path: Path) -> Identity:
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _recall(place: Path, path: Path, identity: Identity) -> Content | None:
    """What is remembered of a path with an identity."""
    try:
        known = json.loads(place.read_text())
        if known["path"] == str(path) and known["identity"] == identity:
            return Content(known["xxh3_128"], known["lines"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
