"""How a run is asked to stop, and what a launched rank does to die in time.

The command writes the *stop file* at the first signal; rank 0 looks for it once a step and the
trainer agrees it over the ranks. A run without a command (a notebook) catches the signals itself.
A launched rank reports its exit code through a file, because the `deepspeed` launcher loses it, and
ends when the processes that started it are gone. Knows neither torch nor the trainer.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread, current_thread, main_thread
from types import FrameType
from typing import Any

from arctic_like.errors import FAILED

STOP_FILE = "ARCTIC_STOP_FILE"
CONTROL_DIR = "ARCTIC_CONTROL_DIR"
ENVIRONMENT_OPTION = "--arctic-environment="
"""Worker argument that carries our environment to other nodes, as base64 of a JSON map."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopRequest:
    """Whether a stop was asked for: by the command (the stop file) or by a signal to us."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._signal = 0

    @classmethod
    def from_environment(cls) -> StopRequest:
        """The request that the command can make; never made where there is no command."""
        path = os.environ.get(STOP_FILE)
        return cls(Path(path) if path else None)

    def ask(self, signum: int) -> None:
        """Ask this process to stop, as if signal `signum` had come. The first one asked stays."""
        self._signal = self._signal or signum

    def requested(self) -> int:
        """0, or the number of the signal that asked for the stop.

        Costs one `stat`. Call it on rank 0 once a step and agree the number over the ranks.
        """
        if not self._signal and self.path is not None and self.path.exists():
            self._signal = _read_signal(self.path)
        return self._signal


def _read_signal(path: Path) -> int:
    """The number in a stop file. A file made by hand (`touch`) asks as SIGTERM does."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return int(signal.SIGTERM)


@contextmanager
def catch_signals(stop: StopRequest) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a stop request; the second does what it did before.

    For runs inside somebody's own process. Does nothing outside the main thread, where Python
    allows no handlers. The handlers of before are put back at the first signal and at the end.
    """
    if current_thread() is not main_thread():
        yield stop
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def first(signum: int, frame: FrameType | None) -> None:
        stop.ask(signum)
        put_back()

    for signum in before:
        signal.signal(signum, first)
    try:
        yield stop
    finally:
        put_back()


def install_rank_guards() -> None:
    """Make this process a well-behaved rank. The worker calls it first, before heavy imports.

    SIGINT is ignored (the command decides), SIGTERM ends the process at once (the launcher sends it
    when another rank failed), and the process ends when those that started it are gone.
    """
    _adopt_environment(sys.argv)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher sets it to the ranks' numbers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _note("started", {})
    _die_with_parent()
    Thread(target=_watch, args=(_line_of_descent(),), name="rank-watch", daemon=True).start()


def report_exit(code: int) -> None:
    """Leave this rank's exit code for the command. Call it at *every* end, 0 included, just before
    the process ends: the first code that is not 0 becomes the command's.
    """
    _note("ended", {"code": int(code), "time": time.time()})


def environment_argument(values: Mapping[str, str]) -> str:
    """The worker argument that carries `values` to other nodes; no launcher exports them."""
    return ENVIRONMENT_OPTION + urlsafe_b64encode(json.dumps(dict(values)).encode()).decode()


def _adopt_environment(argv: list[str]) -> None:
    for argument in [a for a in argv if a.startswith(ENVIRONMENT_OPTION)]:
        argv.remove(argument)
        content = urlsafe_b64decode(argument.removeprefix(ENVIRONMENT_OPTION))
        os.environ.update(json.loads(content))


def _note(kind: str, content: dict[str, Any]) -> None:
    """Write one small file into the command's control folder; nothing where there is no command."""
    folder = os.environ.get(CONTROL_DIR)
    if not folder:
        return
    path = Path(folder) / f"{socket.gethostname()}-{os.getpid()}.{kind}"
    aside = path.with_suffix(".aside")
    with suppress(OSError):  # the command is gone and has taken the folder with it
        aside.write_text(json.dumps({"rank": os.environ.get("RANK", ""), **content}))
        aside.replace(path)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _parent_of(pid: int) -> int:
    """Parent's id from /proc/<pid>/stat, 0 where the process is gone or there is no /proc."""
    if pid == os.getpid():
        return os.getppid()
    try:
        # "pid (name) state ppid …"; the name may hold spaces and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _line_of_descent() -> dict[int, int]:
    """pid → parent's pid, from this process up to the leader of its session.

    On a remote node the leader's parent is the ssh or Slurm daemon that stands for the command:
    when that ends, nothing else tells the ranks. What is above it does not concern the run.
    """
    session, pid, line = os.getsid(0), os.getpid(), {}
    while parent := _parent_of(pid):
        line[pid] = parent
        if pid == session:
            break
        pid = parent
    return line


def _watch(line: dict[int, int]) -> None:
    while all(_parent_of(pid) == parent for pid, parent in line.items()):
        time.sleep(0.5)
    report_exit(FAILED)
    os._exit(FAILED)
