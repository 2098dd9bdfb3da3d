"""The command with real processes: signals, kill -9, exit codes. The worker is `stand_in.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
TWO = ["--num_gpus", "2"]
full = pytest.mark.full


@dataclass
class Command:
    folder: Path
    process: subprocess.Popen[str]
    session: int = 0
    seen: set[int] = field(default_factory=set)

    def wait_for(self, *names: str) -> list[int]:
        """Wait until the ranks have written these files; returns the numbers in them."""
        until(lambda: all(_number(self.folder / n) is not None for n in names), 60, str(names))
        numbers = [_number(self.folder / n) or 0 for n in names]
        if not self.session:
            self.session = os.getsid(numbers[0])
        return numbers

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said

    def left(self) -> list[psutil.Process]:
        """Living processes of the run's session."""
        found = []
        for process in psutil.process_iter():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.getsid(process.pid) == self.session:
                    found.append(process)
            except (psutil.Error, ProcessLookupError):
                continue
        return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(mode: str, *options: str, **environment: str) -> Command:
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        folder = tmp_path / "seen"
        folder.mkdir()
        process = subprocess.Popen(
            [sys.executable, str(HERE / "command.py"), str(tmp_path / "out" / "run"), *options],
            env={**os.environ, "STAND_IN": mode, "STAND_IN_DIR": str(folder),
                 "PYTHONPATH": str(HERE), "TMPDIR": str(temporary), **environment},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path,
        )  # fmt: skip
        started.append(Command(folder, process))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
        command.process.communicate()


@pytest.mark.parametrize(
    ("phase", "options"),
    [("import", []), ("deaf", []), ("children", []), ("import", TWO), ("deaf", TWO),
     pytest.param("children", TWO, marks=full)],
    ids=lambda value: {"[]": "one", str(TWO): "two"}.get(str(value), str(value)),
)  # fmt: skip
def test_nothing_outlives_a_killed_command(start, tmp_path, options, phase):
    command = start(phase, *options)
    ranks = range(2 if options else 1)
    command.wait_for(*[f"{'importing' if phase == 'import' else 'running'}-{r}" for r in ranks])
    assert len(command.left()) >= len(ranks)
    command.process.kill()
    until(lambda: not command.left(), 2, "no process left")
    assert list((tmp_path / "tmp").glob("arctic-*")) == []


@pytest.mark.parametrize(
    ("signum", "code", "options"),
    [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, []), (signal.SIGINT, 130, TWO),
     pytest.param(signal.SIGTERM, 143, TWO, marks=full)],
)  # fmt: skip
def test_first_signal_asks_for_a_stop(start, tmp_path, options, signum, code):
    command = start("run", *options)
    ranks = range(2 if options else 1)
    command.wait_for(*[f"running-{r}" for r in ranks])
    command.process.send_signal(signum)
    assert command.wait_for(*[f"stopped-{r}" for r in ranks]) == [signum] * len(ranks)
    ended, said = command.end()
    assert ended == code
    assert said.count("again to kill") == 1
    assert command.left() == []
    assert list((tmp_path / "tmp").glob("arctic-*")) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [[], pytest.param(TWO, marks=full)], ids=["one", "two"])
def test_second_signal_kills(start, options):
    command = start("deaf", *options)
    command.wait_for("running-0")
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert command.process.poll() is None
    began = time.monotonic()
    command.process.send_signal(signal.SIGINT)
    assert command.end()[0] == 143
    assert time.monotonic() - began < 2
    assert command.left() == []


@pytest.mark.parametrize("code", [0, 1, 2])
def test_one_process_passes_its_code_on(start, code):
    assert start(f"codes:{code}").end()[0] == code


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("2,-1", 2), pytest.param("0,0", 0, marks=full), pytest.param("-1,1", 1, marks=full)],
    ids=["first", "done", "second"],
)
def test_first_failing_rank_decides(start, codes, expected):
    assert start(f"codes:{codes}", *TWO).end()[0] == expected


@pytest.mark.parametrize(
    ("codes", "options"), [("-9", []), pytest.param("0,-9", TWO, marks=full)], ids=["one", "two"]
)
def test_killed_rank_is_named(start, codes, options):
    code, said = start(f"codes:{codes}", *options).end()
    assert code == 1
    assert "SIGKILL" in said
    assert "memory" in said


def test_no_report_is_a_failure(start):
    code, said = start("raise").end()
    assert code == 1
    assert "SystemError" in said


def test_ranks_end_when_the_launcher_is_killed(start):
    """Nobody but the ranks' own watch notices this; the launcher's front would even exit 0."""
    command = start("deaf", *TWO)
    rank, _ = command.wait_for("running-0", "running-1")
    psutil.Process(rank).parent().kill()
    assert command.end()[0] == 1
    assert command.left() == []


@full
def test_ranks_end_when_the_guard_is_killed(start):
    command = start("deaf", *TWO)
    command.wait_for("running-0", "running-1")
    os.kill(command.session, signal.SIGKILL)
    assert command.end()[0] == 1
    until(lambda: not command.left(), 2, "no process left")


def test_environment_of_one_process(start, tmp_path):
    command = start("environment", OMP_NUM_THREADS="3")
    assert command.end()[0] == 0
    seen = dict(x.split("=", 1) for x in (command.folder / "environment-0").read_text().split("\n"))
    assert seen["ARCTIC_RECIPE"] == "a recipe.yaml"
    assert json.loads(seen["ARCTIC_OVERRIDES"]) == ["optimizer.lr=1e-5", 'name="a b"']
    assert seen["ARCTIC_OUTPUT_DIR"] == str(tmp_path / "out" / "run")
    assert seen["ARCTIC_RESUME"] == "auto"
    assert seen["ARCTIC_COMMAND"] == "arctic-train 'a recipe.yaml'"
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_RANK"]) == ("0", "1", "0")
    assert seen["DS_ACCELERATOR"] == "cpu"
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["OMP_NUM_THREADS"] == "3"


def test_environment_of_two_processes(start):
    command = start("environment", *TWO)
    assert command.end()[0] == 0
    for rank in range(2):
        text = (command.folder / f"environment-{rank}").read_text()
        seen = dict(x.split("=", 1) for x in text.split("\n"))
        assert (seen["RANK"], seen["WORLD_SIZE"]) == (str(rank), "2")
        assert seen["DS_ACCELERATOR"] == "cpu"
        assert seen["CUDA_VISIBLE_DEVICES"] == ""
        assert int(seen["OMP_NUM_THREADS"]) >= 1
        assert seen["ARCTIC_OVERRIDES"].startswith("[")


@full
def test_one_process_where_an_option_says_nothing_about_their_number(start):
    command = start("environment", "--master_port", "23457")
    assert command.end()[0] == 0
    text = (command.folder / "environment-0").read_text()
    assert "WORLD_SIZE=1" in text
    assert "MASTER_PORT=23457" in text
