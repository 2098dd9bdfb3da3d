"""The run directory: what lies where, who owns it, and what is written about the run itself.

    output_dir/
      recipe.yaml         the resolved recipe
      environment.json    one entry for each start: versions, git revision, devices, command
      metrics.jsonl       the record of truth (tracking/metrics_file.py)
      logs/rank-N.log     checkpoints/step-N/     exports/step-N/
      .lock               held by rank 0 while a run goes on

Used by the command before the launch and by rank 0 during the run. Light: no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from arctic_like.errors import Problem, RecipeError, RunError

PACKAGES = (
    "arctic-like", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors",
    "peft", "accelerate", "numpy", "pydantic", "flash-attn", "liger-kernel", "triton",
)  # fmt: skip
_held: set[int] = set()
"""Descriptors of held locks. A forked child (a data worker) lets go of its copies, so that the lock
ends with the process that took it."""


def _let_go_after_fork() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_after_fork)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill, meets the old content or the new, never a part.

    The new content is on the disk when this returns.
    """
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


class RunDirectory:
    """Names and contents of one run directory. Making the object touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.exports = path / "exports"
        self._lock_file = path / ".lock"

    def holds_run(self) -> bool:
        """Whether a run has started here: its recipe, metrics or a checkpoint is there."""
        return (
            self.recipe.exists()
            or self.metrics.exists()
            or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))
        )

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse what cannot be: a run over an existing run, a path that cannot be a folder.

        Raises RecipeError with the ways out. Writes nothing, so the command asks before the launch.
        """
        self._check_place()
        if self.holds_run() and not (resume or overwrite):
            raise RecipeError(self.refusal())

    def refusal(self) -> Problem:
        """What is wrong with a new run over the one that is here, and the three ways out."""
        return Problem(
            f"{self.path} holds a run already",
            place="output_dir",
            hint=f"go on with it: arctic-train resume {self.path}\n"
            "    keep it: another output_dir\n"
            "    replace it: overwrite=true",
        )

    def _check_place(self) -> None:
        existing = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        if not existing.is_dir():
            reason = f"{existing} is a file, not a folder"
        elif not os.access(existing, os.W_OK | os.X_OK):
            reason = f"{existing} cannot be written to"
        else:
            return
        raise RecipeError(Problem(reason, place="output_dir", hint="give another output_dir"))

    @contextlib.contextmanager
    def lock(self, *, wait: float = 3.0) -> Iterator[None]:
        """Own the directory, made if it is not there; one run at a time.

        Waits up to `wait` seconds for a run that is just ending. Raises RunError naming the owner.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock_file.open("a+") as file:
            self._acquire(file, until=time.monotonic() + wait)
            _held.add(file.fileno())
            try:
                file.truncate(0)
                file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
                file.flush()
                yield
            finally:
                _held.discard(file.fileno())
                file.truncate(0)  # closing it releases the lock

    def _acquire(self, file: TextIO, *, until: float) -> None:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    raise RunError(
                        f"{self.path} belongs to a run that goes on ({self._owner()}); "
                        "wait for it, stop it, or give another output_dir"
                    ) from None
            time.sleep(0.05)

    def _owner(self) -> str:
        try:
            owner = json.loads(self._lock_file.read_text())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "its process is not known"

    def clear(self, checkpoints: Path | None = None) -> None:
        """Remove the run that is here (`overwrite: true`), and no file that a run did not write.

        checkpoints: where the run's checkpoints lie, if elsewhere; of that folder only what is a
        checkpoint goes. Call it under the lock. The recipe goes last: until then the directory
        still holds a run.
        """
        for folder in (self.checkpoints, self.exports, self.logs, self.path / "stream"):
            if folder.exists():
                shutil.rmtree(folder)
        if checkpoints is not None and checkpoints.is_dir():
            patterns = ("step-*", "superseded-*", "latest", "best", "rewinds.json")
            for entry in [e for pattern in patterns for e in checkpoints.glob(pattern)]:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for file in (self.path / "result.json", self.metrics, self.environment, self.recipe):
            file.unlink(missing_ok=True)

    def write_recipe(self, text: str) -> None:
        """Save the resolved recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.recipe, text)

    def write_environment(
        self, *, world_size: int, devices: list[str], resumed_from: str | None = None
    ) -> None:
        """Add an entry for this start, so that a resumed run tells of each of its starts.

        devices: the names of the ranks' devices. Versions come from the packages' metadata, without
        importing them; the command line from ARCTIC_COMMAND, which the command sets.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        start = {
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": os.environ.get("ARCTIC_COMMAND") or shlex.join(sys.argv),
            "folder": str(Path.cwd()),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": world_size,
            "devices": devices,
            "processor": _processor(),
            "resumed_from": resumed_from,
            "git": git_revision(Path.cwd()),
            "python": sys.version.split()[0],
            "platform": _platform(),
            "packages": package_versions(),
        }
        self._write_starts([*self.starts(), start])

    def note_start_up(self, seconds: Mapping[str, float]) -> None:
        """Add to the entry of this start how long its parts took, from the command to the first step."""
        starts = self.starts()
        if starts:
            rounded = {name: round(value, 3) for name, value in seconds.items()}
            self._write_starts([*starts[:-1], {**starts[-1], "start_up": rounded}])

    def _write_starts(self, starts: list[dict[str, Any]]) -> None:
        write_atomically(self.environment, json.dumps({"starts": starts}, indent=2) + "\n")

    def starts(self) -> list[dict[str, Any]]:
        """The entries of environment.json, oldest first; none where it is absent or unreadable."""
        try:
            content = json.loads(self.environment.read_text())
            return [dict(start) for start in content["starts"]]
        except (OSError, ValueError, KeyError, TypeError):
            return []


def package_versions() -> dict[str, str]:
    """Versions of what shapes a run, of the packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the repository around `folder` and whether files differ from it; None if none."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": commit, "dirty": dirty}


def _git(folder: Path, *words: str) -> str:
    # --no-optional-locks: leave the user's index alone. The limit is for slow disks.
    done = subprocess.run(
        ["git", "--no-optional-locks", *words],
        cwd=folder, capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name and the number of cores, as far as the system tells."""
    name = "cpu"
    with contextlib.suppress(OSError):
        models = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def _platform() -> str:
    import platform

    return platform.platform()
