"""The command's side of a run: start the ranks, turn signals into a stop request, return the code.

    command (this process) → guard (own session) → worker                      one local process
                                                 → deepspeed launcher → ranks  otherwise

The command writes nothing but a private folder for the stop file and the ranks' exit codes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from arctic_like import stop
from arctic_like.cli import devices
from arctic_like.cli.launcher_options import LauncherOptions, parse_launcher_options
from arctic_like.cli.startup import process_began
from arctic_like.engine.host import free_port
from arctic_like.errors import DONE, FAILED, INTERRUPTED, TERMINATED

WORKER = "arctic_like.worker"


def launch(
    recipe: Any,
    *,
    overrides: list[str],
    launcher_options: list[str],
    output_dir: Path,
    resume: str,
    argv: list[str],
    worker_module: str = WORKER,
) -> int:
    """Run a validated recipe in processes of its own and wait for them; returns the exit code.

    `recipe` needs `path` and `config.device`. `resume` is "", "auto", "latest", "step-12" or a
    path; `argv` the command line for the record. Raises RecipeError for launcher options that
    cannot be.
    """
    options = parse_launcher_options(launcher_options)
    control = _control_folder(output_dir, shared=options.multi_node)
    try:
        own = {
            "ARCTIC_RECIPE": str(recipe.path),
            "ARCTIC_OVERRIDES": json.dumps(overrides),
            "ARCTIC_OUTPUT_DIR": str(output_dir.absolute()),
            "ARCTIC_RESUME": resume,
            "ARCTIC_COMMAND": shlex.join(argv),
            "ARCTIC_STARTED": repr(process_began()),
            stop.STOP_FILE: str(control / "stop"),
            stop.CONTROL_DIR: str(control),
        }
        device = str(getattr(recipe.config, "device", "auto"))
        gpus = 0 if device == "cpu" else devices.visible_gpus()
        if device == "cpu":
            own |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        program, extra = plan(options, gpus=gpus, worker=worker_module, own=own)
        return _Run(control).wait_for(program, {**os.environ, **extra, **own})
    finally:
        shutil.rmtree(control, ignore_errors=True)


def plan(
    options: LauncherOptions, *, gpus: int, worker: str, own: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The program to start and the environment that it needs beside ours. Pure but for the port."""
    environment: dict[str, str] = {}
    if not gpus and not options.multi_node and "DS_ACCELERATOR" not in os.environ:
        environment["DS_ACCELERATOR"] = "cpu"
    if not options.given and not options.multi_node and gpus <= 1:
        # No launcher: it would import torch and deepspeed twice more, 2.5 s before the first line.
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                        **_threads(gpus, 1)}  # fmt: skip
        return [sys.executable, "-u", "-m", worker], environment
    words = list(options.given)
    processes = options.processes
    if not gpus and not options.multi_node and not options.chooses_devices:
        processes = 1  # DeepSpeed would start one for each NUMA node
        words += ["--num_gpus", "1"]
    if not options.port and not options.multi_node:
        words += ["--master_port", str(free_port())]
    if not options.quiet:
        # What it has to say is chatter, or an exception follows; failed ranks speak for themselves.
        words += ["--log_level", "critical"]
    if not options.binds_cores and processes is not None:
        environment |= _threads(gpus, processes)
    words += ["--module", "--no_local_rank", worker]
    if options.multi_node:
        words.append(stop.environment_argument(own))
    return [sys.executable, "-u", "-m", "deepspeed.launcher.runner", *words], environment


def _threads(gpus: int, processes: int) -> dict[str, str]:
    """Share the cores out among the processes on CPU, unless the user has decided."""
    if gpus or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, devices.usable_cores() // processes))}


def _control_folder(output_dir: Path, *, shared: bool) -> Path:
    """A private folder: in the system's temporary place, or, for several machines, where the run's
    output goes, which they must share anyway.
    """
    if not shared:
        return Path(tempfile.mkdtemp(prefix="arctic-"))
    place = next(p for p in [output_dir, *output_dir.absolute().parents] if p.is_dir())
    return Path(tempfile.mkdtemp(prefix=".arctic-", dir=place)).absolute()


class _Run:
    """One launched run, from the guard's start to the exit code."""

    def __init__(self, control: Path) -> None:
        self.control = control
        self.guard: subprocess.Popen[bytes] | None = None
        self.asked: list[int] = []

    def wait_for(self, program: list[str], environment: dict[str, str]) -> int:
        """Start `program` under a guard and wait for it to end."""
        read_end, write_end = os.pipe()  # neither end is inherited unless said so
        guard = [sys.executable, "-S", "-E", str(Path(__file__).with_name("guard.py"))]
        with self._signals():
            self.guard = subprocess.Popen(
                [*guard, str(read_end), str(self.control), *program],
                env=environment, pass_fds=(read_end,), start_new_session=True,
            )  # fmt: skip
            os.close(read_end)
            if len(self.asked) > 1:  # both signals came before there was anything to kill
                self._kill()
            status = self.guard.wait()
            self._kill()  # whatever the ranks left behind
        os.close(write_end)
        return self._exit_code(status)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals are requests while the run goes on. A hang-up counts as SIGTERM (nohup: not)."""
        caught = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        before = {s: signal.getsignal(s) for s in caught}
        for signum, handler in before.items():
            if signum != signal.SIGHUP or handler is not signal.SIG_IGN:
                signal.signal(signum, self._on_signal)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.asked.append(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)
        if len(self.asked) > 1:
            self._kill()
            return
        aside = self.control / "stop.aside"
        aside.write_text(str(int(self.asked[0])))
        aside.replace(self.control / "stop")
        _say("stopping after this step; again to kill")

    def _kill(self) -> None:
        if self.guard is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.guard.pid, signal.SIGKILL)

    def _exit_code(self, status: int) -> int:
        """The first failing rank's code. `status` is the guard's: the launcher's, which is less."""
        ended = sorted(self._notes("ended"), key=lambda note: float(note["time"]))
        stopped = (DONE, INTERRUPTED, TERMINATED)
        failures = [int(note["code"]) for note in ended if note["code"] not in stopped]
        if self.asked:
            killed = len(self.asked) > 1 or not failures
            return 128 + self.asked[0] if killed else failures[0]
        codes = failures or [int(note["code"]) for note in ended if note["code"] != DONE]
        if codes:
            return codes[0]
        if status == DONE and len(ended) == len(self._notes("started")):
            return DONE
        _say(_explain_silence(status))
        return FAILED

    def _notes(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.control.glob(f"*.{kind}")]


def _explain_silence(status: int) -> str:
    """A sentence for a run that ended without a rank saying why."""
    number = next((n for n in (-status, status - 128, 256 - status) if 0 < n < 32), 0)
    if number == signal.SIGKILL:
        return "a process of the run was killed (SIGKILL); most often the memory was full"
    if number:
        return f"a process of the run was ended by {signal.Signals(number).name}"
    return f"the run ended (code {status}) before its processes could report"


def _say(sentence: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"\narctic-train: {sentence}\n")
        sys.stderr.flush()
