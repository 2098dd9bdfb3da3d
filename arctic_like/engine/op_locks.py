"""Locks that a killed process left where torch keeps compiled extensions.

DeepSpeed loads its compiled operators through `torch.utils.cpp_extension`, which takes a file named `lock`
for the time of it and removes it afterwards. A process that is killed in between leaves it, and every later
run would wait for ever, without a word.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path

LOCAL = {"ext2/ext3", "xfs", "btrfs", "tmpfs", "overlayfs", "zfs", "f2fs", "ramfs"}
"""File systems, as `stat -f` names them, whose files only processes of this machine hold."""
PATIENCE = 1800.0
"""Seconds after which a lock on a shared file system counts as left behind: no operator compiles so long."""


def remove_stale_locks() -> list[Path]:
    """Remove locks of this user that no process holds any more; returns them.

    On a file system of this machine, a lock is held as long as a process has it open; on a shared one,
    where the process may run elsewhere, it is given half an hour.
    """
    removed = []
    for lock in _locks():
        with contextlib.suppress(OSError):
            facts = lock.stat()
            if facts.st_uid != os.getuid() or _is_held(lock):
                continue
            if not _is_local(lock) and time.time() - facts.st_mtime < PATIENCE:
                continue
            lock.unlink()
            removed.append(lock)
    return removed


def _locks() -> list[Path]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return sorted(Path(root).glob("*/lock"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return sorted((cache / "torch_extensions").glob("*/*/lock"))


def _is_held(lock: Path) -> bool:
    """Whether a process that this user can look at has the file open; True where it cannot be known."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").is_dir():
        return True
    wanted = str(lock.resolve())
    for descriptors in processes.glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(descriptors):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path) == wanted:
                        return True
    return False


def _is_local(lock: Path) -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["stat", "-f", "-c", "%T", str(lock)], capture_output=True, text=True, check=False,
            timeout=10,
        )  # fmt: skip
        return told.stdout.strip() in LOCAL
    return False
