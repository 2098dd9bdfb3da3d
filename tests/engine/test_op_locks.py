"""A process that was killed while it loaded a compiled operator does not stop later runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arctic_like.engine import op_locks

HOLDER = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_operator").mkdir()
    return tmp_path / "some_operator" / "lock"


def test_a_lock_goes_when_its_process_is_gone_and_not_before(lock: Path) -> None:
    """torch's own lock, taken by another process, which is then killed with -9."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert op_locks.remove_stale_locks() == []
    assert lock.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.exists()
    assert op_locks.remove_stale_locks() == [lock]
    assert not lock.exists()


def test_on_a_shared_file_system_it_is_given_time(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may run on another machine."""
    monkeypatch.setattr(op_locks, "LOCAL", set())
    lock.write_text("")
    assert op_locks.remove_stale_locks() == []
    long_ago = time.time() - op_locks.PATIENCE - 1
    os.utime(lock, (long_ago, long_ago))
    assert op_locks.remove_stale_locks() == [lock]


def test_the_folder_is_where_torch_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = Path(_get_build_directory("some_operator", verbose=False)) / "lock"
    lock.write_text("")
    assert op_locks.remove_stale_locks() == [lock]


def test_setting_up_this_project_removes_it(lock: Path) -> None:
    """`make setup` builds operators before any run: it would be the first to wait."""
    lock.write_text("")
    builder = Path(__file__).parents[2] / ".ci" / "build_ops.py"
    done = subprocess.run(
        [sys.executable, str(builder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    assert str(lock) in done.stderr
    assert not lock.exists()
