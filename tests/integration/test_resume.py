"""Killed with -9 at any moment and started again by the same command, a run is the run never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .tools import (
    arctic_train,
    environment,
    lines,
    recipe,
    without_clocks,
    write_conversations,
    write_recipe,
)  # fmt: skip

STEPS = 12


def processes_of(run: Path) -> list[int]:
    """Processes whose environment names this run directory (the command's own excepted: it sets it)."""
    found = []
    wanted = f"ARCTIC_OUTPUT_DIR={run.absolute()}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill_when(command: list[str], moment: Callable[[], bool], *, run: Path, cwd: Path) -> None:
    """Start the command in a group of its own and kill the group with -9 once `moment()` is true."""
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not moment():
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(f"ended before the moment: {process.stderr.read()[-3000:]}")
        assert time.monotonic() < limit, "the moment never came"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)
    assert processes_of(run) == []


def counted(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        pytest.param(2, 2, marks=pytest.mark.full),
        pytest.param(2, 3, marks=pytest.mark.full),
        pytest.param(1, 0, marks=pytest.mark.full),
        pytest.param(1, 3, marks=pytest.mark.full),
    ],
)
def test_a_run_killed_four_times_is_the_run_that_was_never_killed(
    tmp_path: Path, ranks: int, stage: int
) -> None:
    """Also before the first checkpoint and after the last step."""
    check_kills(tmp_path, ranks, stage, which=(0, 1, 2, 3))


def test_a_killed_run_is_the_run_that_was_never_killed(tmp_path: Path) -> None:
    check_kills(tmp_path, ranks=2, stage=2, which=(2,))


def check_kills(tmp_path: Path, ranks: int, stage: int, which: tuple[int, ...]) -> None:
    """Accumulation 4 and dropout; killed before the first checkpoint, while one is written, in epoch 2,
    and after the last step."""
    data = write_conversations(tmp_path / "data.jsonl", count=60)
    content = recipe(
        data, epochs=3, train_iters=0, micro_batch_size=2, gradient_accumulation_steps=4 // ranks * 1,
        data__pack_samples=False, data__train_eval_split=[0.8, 0.2], eval_interval=4, eval_at_end=True,
        model__config={**recipe(data)["model"]["config"], "attention_dropout": 0.2},
        deepspeed__zero_optimization__stage=stage,
        checkpoint=[
            {"type": "deepspeed", "save_every_n_steps": 3, "save_end_of_training": True,
             "auto_resume": True, "keep_last": 2},
            {"type": "huggingface", "save_end_of_training": True},
        ],
    )  # fmt: skip
    content["gradient_accumulation_steps"] = 4
    path = write_recipe(tmp_path / "recipe.yaml", content)
    words = [str(path), *([] if ranks == 1 else ["--num_gpus", str(ranks)])]

    def words_for(name: str) -> list[str]:
        return [words[0], f"output_dir={tmp_path / name}", *words[1:]]

    done = arctic_train(*words_for("straight"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    total = len(lines(straight))
    command = [sys.executable, "-m", "arctic_like.cli.main", *words_for("killed")]
    checkpoints = killed / "checkpoints"
    some = random.Random(os.urandom(8)).randint(total // 2, total - 3)
    print(f"killed in the middle after {some} of {total} lines")
    moments: list[Callable[[], bool]] = [
        lambda: counted(killed) >= 1,
        lambda: any(checkpoints.glob("step-*.partial")),
        lambda: counted(killed) >= some,
        lambda: counted(killed) >= total,
    ]
    for number in which:
        kill_when(command, moments[number], run=killed, cwd=tmp_path)
    again = arctic_train(*words_for("killed"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert without_clocks(killed) == without_clocks(straight)
    weights = "model.safetensors"
    (one,) = (straight / "exports").glob(f"step-*/{weights}")
    (other,) = (killed / "exports").glob(f"step-*/{weights}")
    assert one.read_bytes() == other.read_bytes()
    assert not list(checkpoints.glob("*.partial"))
    assert len(list(checkpoints.glob("step-*"))) == 2


def test_a_signal_stops_after_the_step_and_resume_goes_on_from_there(tmp_path: Path) -> None:
    """Ctrl-C: exit code 130 and a checkpoint of the step that had ended; `resume` is then the same run."""
    data = write_conversations(tmp_path / "data.jsonl", count=40)
    content = recipe(
        data, train_iters=60, micro_batch_size=2, gradient_accumulation_steps=2,
        model__config={**recipe(data)["model"]["config"], "attention_dropout": 0.2},
        checkpoint=[{"type": "deepspeed", "save_end_of_training": True}],
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    assert arctic_train(str(path), "output_dir=straight", cwd=tmp_path).returncode == 0
    run = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "arctic_like.cli.main", str(path), "output_dir=stopped"],
        cwd=tmp_path, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while counted(run) < 5:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert processes_of(run) == []
    done = lines(run)[-1]["step"]
    assert done < 60
    assert [p.name for p in (run / "checkpoints").glob("step-*")] == [f"step-{done}"]
    again = arctic_train("resume", "stopped", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert without_clocks(run) == without_clocks(tmp_path / "straight")
