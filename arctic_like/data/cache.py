"""A folder of prepared data: entries under keys of everything that shapes them, whole or absent.

    <root>/<kind>/<key>/          the entry; `complete.json` in it is written last
    <root>/<kind>/<key>.lock      held (flock) by the process that prepares it; says which that is
    <root>/<kind>/<key>.error     why the last attempt failed, for those that wait

No collective is involved: whoever takes the lock prepares, all others look at the file system. The
lock falls with its process, so nothing that crashed is in the way. Where a file system keeps locks
to one node, several nodes may prepare the same entry; each writes aside, and the first rename wins.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from arctic_like.errors import WRONG, ArcticError, RecipeError, RunError

MARKER = "complete.json"
ENVIRONMENT = "ARCTIC_LIKE_CACHE"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_POLL_SECONDS = 0.2
_TELL_SECONDS = 60.0


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


def file_hash(path: Path) -> str:
    """xxh3 (128 bits) of a file's content, read in pieces."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return str(digest.hexdigest())


def facts(entry: Path) -> dict[str, Any]:
    """What the preparing process wrote into the entry's marker."""
    content: dict[str, Any] = json.loads((entry / MARKER).read_text())
    return content


def obtain(
    folder: Path,
    key: str,
    prepare: Callable[[Path], dict[str, Any]],
    *,
    missing_ok: bool = True,
    what: str = "data",
) -> Path:
    """The complete entry `folder/key`, made by `prepare` here or in another process.

    prepare: fills an empty folder and returns facts for the marker. Raises RecipeError where the
    entry is not there and `missing_ok` is false, and whatever `prepare` raised, also in those that
    waited.
    """
    entry = folder / key
    if (entry / MARKER).is_file():
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
    with _lock(entry) as taken:
        while not taken():
            if (entry / MARKER).is_file():
                return entry
            _raise_failure(entry, since=started)
            time.sleep(_POLL_SECONDS)
        if not (entry / MARKER).is_file():
            _raise_failure(entry, since=started)
            _prepare(entry, prepare)
    return entry


def await_entry(entry: Path, *, since: float, alive: Callable[[], None] | None = None) -> Path:
    """The complete entry that another process makes.

    since: Unix time from which on a failure is one of this run. alive: raises if that process is
    gone. Raises what made it fail, as `obtain`.
    """
    pause = 0.005
    while not (entry / MARKER).is_file():
        _raise_failure(entry, since=since)
        if alive is not None:
            alive()
        time.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS)
    return entry


def _prepare(entry: Path, prepare: Callable[[Path], dict[str, Any]]) -> None:
    _remove_leftovers(entry)
    with suppress(FileNotFoundError):
        _beside(entry, ".error").unlink()
    aside = _beside(entry, f".tmp-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        content = prepare(aside)
        for path in aside.iterdir():
            _sync(path)
        _write(aside / MARKER, content)
        try:
            aside.rename(entry)
        except OSError:
            if not (entry / MARKER).is_file():
                raise
    except BaseException as error:
        _write(_beside(entry, ".error"), _failure(error))
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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


@contextmanager
def _lock(entry: Path) -> Iterator[Callable[[], bool]]:
    """A function that tries to take the entry's lock; it is released at the end, or with the
    process."""
    from loguru import logger

    told = time.monotonic()
    with _beside(entry, ".lock").open("a+") as file:

        def take() -> bool:
            nonlocal told
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    logger.warning(f"{entry.parent} has no file locks: several may prepare at once")
                    return True
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() - told > _TELL_SECONDS:
                    told = time.monotonic()
                    file.seek(0)
                    logger.info("waiting for data that {} prepares", file.read().strip())
                return False
            file.seek(0)
            file.truncate()
            file.write(f"{socket.gethostname()}, process {os.getpid()}\n")
            file.flush()
            return True

        yield take


def _remove_leftovers(entry: Path) -> None:
    """Remove what processes of this machine that are gone wrote aside."""
    start = f"{entry.name}.tmp-{socket.gethostname()}-"
    for path in entry.parent.glob(f"{entry.name}.tmp-*"):
        pid = path.name.removeprefix(start)
        if pid.isdigit() and not _lives(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


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
