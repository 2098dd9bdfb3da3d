"""A folder of prepared data: entries under keys of everything that shapes them, whole or absent.

    <root>/<kind>/<key>/                  the entry; `complete.json` in it is written last
    <root>/<kind>/<key>.tmp-<host>-<pid>/ where it is made; with `progress.json` the next one goes on
    <root>/<kind>/<key>.lock              held (flock) by the process that prepares it
    <root>/<kind>/<key>.error             why the last attempt failed, for those that wait

No collective is involved: whoever takes the lock prepares, all others look at the file system. The
lock falls with its process, so nothing that crashed is in the way. Where a file system keeps locks
to one node, several nodes may prepare the same entry; each writes aside, and the first rename wins.
What a process of another node left is therefore copied, never taken: that one may be alive.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from arctic_like.errors import WRONG, ArcticError, RecipeError, RunError

VERSION = 2
"""Of the format. Part of every key and marker; goes up when the same rows would become other tokens,
samples or files."""

MARKER = "complete.json"
PROGRESS = "progress.json"
ENVIRONMENT = "ARCTIC_LIKE_CACHE"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_POLL_SECONDS = 0.2
_TELL_SECONDS = 60.0
_ABANDONED_SECONDS = 24 * 3600.0
"""What another node left and did not touch for so long is removed."""


def root(cache_dir: Path | None) -> Path:
    """The cache folder: the recipe's, else $ARCTIC_LIKE_CACHE, else ~/.cache/arctic_like.

    A user's own folder rather than the run's, so that the next run finds what this one prepared.
    """
    if cache_dir is not None:
        return cache_dir.expanduser()
    if given := os.environ.get(ENVIRONMENT):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "arctic_like"


def key_of(content: Any) -> str:
    """A key of 32 hex digits of anything that JSON can hold."""
    import xxhash

    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def facts(entry: Path) -> dict[str, Any]:
    """What the preparing process wrote into the entry's marker."""
    content: dict[str, Any] = json.loads((entry / MARKER).read_text())
    del content["version"]
    return content


def progress(folder: Path) -> dict[str, Any] | None:
    """What an attempt that was interrupted last noted in the folder that `prepare` got; None at a
    first one."""
    try:
        noted: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return None
    return noted


def note_progress(folder: Path, content: dict[str, Any]) -> None:
    """Note how far `prepare` is, after what it wrote has reached the disk. From then on the folder
    survives whatever ends the process, and the next attempt gets it as it is.

    content: `rows`, a number that grows, and what else `prepare` wants to know. Files in the folder
    that end in .bin are only ever added to.
    """
    _write(folder / PROGRESS, content)


def obtain(
    folder: Path,
    key: str,
    prepare: Callable[[Path], dict[str, Any]],
    *,
    missing_ok: bool = True,
    what: str = "data",
) -> Path:
    """The complete entry `folder/key`, made by `prepare` here or in another process.

    prepare: fills a folder and returns facts for the marker. The folder is empty, or as the attempt
    before left it when it had noted some progress. Raises RecipeError where the entry is not there
    and `missing_ok` is false, and whatever `prepare` raised, also in those that waited.
    """
    entry = folder / key
    if is_complete(entry):
        with suppress(OSError):  # a cache that one may only read
            os.utime(entry)  # when it was last used, for whoever tidies up
        return entry
    if not missing_ok:
        raise RecipeError(
            f"data.fail_on_missing_cache: {what} is not in the cache ({entry}); "
            "arctic-train preprocess RECIPE prepares it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    with _Lock(entry) as lock:
        while not lock.take():
            if is_complete(entry):
                return entry
            _raise_failure(entry, since=started)
            time.sleep(_POLL_SECONDS)
        if not is_complete(entry):
            _raise_failure(entry, since=started)
            _prepare(entry, prepare, alone=lock.alone)
    return entry


def is_complete(entry: Path) -> bool:
    """Whether an entry is whole, and written in this version's format."""
    try:
        content = json.loads((entry / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("version") == VERSION


def await_entry(entry: Path, *, since: float, alive: Callable[[], None] | None = None) -> Path:
    """The complete entry that another process makes.

    since: Unix time from which on a failure is one of this run. alive: raises if that process is
    gone. Raises what made it fail, as `obtain`.
    """
    pause = 0.005
    while not is_complete(entry):
        _raise_failure(entry, since=since)
        if alive is not None:
            alive()
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    return entry


def _prepare(entry: Path, prepare: Callable[[Path], dict[str, Any]], *, alone: bool) -> None:
    """alone: no other process of this machine prepares the entry."""
    with suppress(FileNotFoundError):
        _beside(entry, ".error").unlink()
    aside = _beside(entry, f".tmp-{socket.gethostname()}-{os.getpid()}")
    _take_over(entry, aside, alone=alone)
    aside.mkdir(exist_ok=True)
    try:
        content = prepare(aside)
        for path in aside.iterdir():
            _sync(path)
        _write(aside / MARKER, {"version": VERSION, **content})
        (aside / PROGRESS).unlink(missing_ok=True)
        if entry.exists() and not is_complete(entry):
            shutil.rmtree(entry, ignore_errors=True)  # of another format, or half removed
        try:
            aside.rename(entry)
        except OSError:
            if not is_complete(entry):
                raise
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException as error:
        if not (aside / PROGRESS).exists():
            shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # a full disk, say, which is the error
            _write(_beside(entry, ".error"), _failure(error))
        raise


def _take_over(entry: Path, aside: Path, *, alone: bool) -> None:
    """Make `aside` of the attempt that came farthest, if one left anything; remove what is dead."""
    own = f"{entry.name}.tmp-{socket.gethostname()}-"
    left = [path for path in entry.parent.glob(f"{entry.name}.tmp-*") if path.is_dir()]
    dead = {p for p in left if p.name.startswith(own) and _is_dead(p.name, own, alone=alone)}
    far = {path: int(noted["rows"]) for path in left if (noted := progress(path))}
    for path in sorted(far, key=lambda one: (-far[one], one not in dead)):
        if path == aside:
            break
        with suppress(OSError):
            if path in dead:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            else:
                _copy(path, aside)
            break
    for path in left:
        abandoned = path in dead or _age(path) > _ABANDONED_SECONDS
        if path != aside and abandoned:
            shutil.rmtree(path, ignore_errors=True)
    if aside.exists() and progress(aside) is None:
        shutil.rmtree(aside, ignore_errors=True)
    for half in aside.glob("*.json.*"):  # killed while it wrote a note
        half.unlink(missing_ok=True)


def _copy(path: Path, aside: Path) -> None:
    """A work folder whose process may still write: what it noted first, then what had been written
    by then, which it only ever adds to."""
    noted = progress(path)
    shutil.rmtree(aside, ignore_errors=True)
    if noted is None:
        return
    aside.mkdir()
    for file in path.iterdir():
        if file.suffix == ".bin":
            shutil.copyfile(file, aside / file.name)
    note_progress(aside, noted)


def _is_dead(name: str, start: str, *, alone: bool) -> bool:
    """Whether a work folder of this machine is nobody's. Process ids are used again, so the lock
    counts more than what lives."""
    pid = name.removeprefix(start)
    return pid.isdigit() and int(pid) != os.getpid() and (alone or not _lives(int(pid)))


def _age(path: Path) -> float:
    newest = 0.0
    with suppress(OSError):
        newest = max(one.stat().st_mtime for one in [path, *path.iterdir()])
    return time.time() - newest if newest else 0.0


def _failure(error: BaseException) -> dict[str, Any]:
    code = error.exit_code if isinstance(error, ArcticError) else 1
    name = "" if isinstance(error, ArcticError) else f"{type(error).__name__}: "
    who = f"{socket.gethostname()}, process {os.getpid()}"
    return {"message": f"{name}{error}", "exit_code": code, "by": who, "time": time.time()}


def _raise_failure(entry: Path, *, since: float) -> None:
    """Raise what made another process fail after `since`; a failure of old is no reason not to
    try."""
    try:
        failure = json.loads(_beside(entry, ".error").read_text())
    except (OSError, ValueError):
        return
    if failure["time"] < since:
        return
    if failure["exit_code"] == WRONG:
        raise RecipeError(failure["message"])
    raise RunError(f"preparing data failed on {failure['by']}: {failure['message']}")


class _Lock:
    """The lock of an entry; released at the end of the context, or with the process.

    alone: taken for sure, so that no other process of this machine has it.
    """

    def __init__(self, entry: Path) -> None:
        self._path = _beside(entry, ".lock")
        self._told = time.monotonic()
        self.alone = False

    def __enter__(self) -> _Lock:
        self._file = self._path.open("a+")
        return self

    def __exit__(self, *_: object) -> None:
        if self.alone:
            # not by closing alone: a forked process may have it open too
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def take(self) -> bool:
        """Try to take it."""
        from loguru import logger

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                folder = self._path.parent
                logger.warning(f"{folder} has no file locks: several may prepare at once")
                return True
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if time.monotonic() - self._told > _TELL_SECONDS:
                self._told = time.monotonic()
                self._file.seek(0)
                logger.info("waiting for data that {} prepares", self._file.read().strip())
            return False
        self.alone = True
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
        self._file.flush()
        return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beside(entry: Path, suffix: str) -> Path:
    return entry.with_name(entry.name + suffix)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: written aside, synced, renamed."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    with aside.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
