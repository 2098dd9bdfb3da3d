"""A checkpoint that is written while training goes on is the one that would have been written at once."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from .test_resume import kill_when
from .tools import (
    arctic_train,
    drive,
    lines,
    recipe,
    without_clocks,
    write_conversations,
    write_recipe,
)  # fmt: skip

SLOW = """
import os, time
from pathlib import Path
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from arctic_like.callbacks.base import Callback

plain = TorchCheckpointEngine.save

def slow(self, state_dict, path):
    time.sleep(float(os.environ.get("SLOW_SECONDS", "0.7")))
    fail = os.environ.get("FAIL_AT", "")
    if fail and fail in path and os.environ.get("RANK", "0") == os.environ.get("FAIL_RANK", "0"):
        raise OSError(28, "No space left on device")
    plain(self, state_dict, path)

TorchCheckpointEngine.save = slow

class Told(Callback):
    name = "told"

    def on_checkpoint_end(self, trainer, path):
        with (trainer.session.directory.path / f"told-{trainer.world.rank}.txt").open("a") as file:
            file.write(f"{path.name} {trainer.global_step} {(path / 'complete.json').exists()}\\n")
"""


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """Eight steps; checkpoints after 3, 6 and at the end; dropout, accumulation, averaged weights."""
    data = write_conversations(folder / "data.jsonl", count=40)
    made = recipe(
        data, train_iters=8, micro_batch_size=1, gradient_accumulation_steps=2,
        model__config={**recipe(data)["model"]["config"], "attention_dropout": 0.2},
        code=str(folder / "slow.py"), callbacks=[{"type": "told"}, {"type": "ema", "decay": 0.9}],
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 3, "save_end_of_training": True}],
        **changes,
    )  # fmt: skip
    (folder / "slow.py").write_text(SLOW)
    return made


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two loaded states differ in type, value or bit."""
    if isinstance(a, torch.Tensor):
        alike = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        return [] if alike and bool((a == b).all()) else [place]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{place}: {list(a)} and {list(b)}"]
        return [one for key in a for one in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)}"]
        pairs = enumerate(zip(a, b, strict=True))
        return [one for i, (x, y) in pairs for one in differences(x, y, f"{place}[{i}]")]
    if hasattr(a, "__dict__") and type(a) is type(b):
        return differences(vars(a), vars(b), place)
    return [] if bool(a == b) else [f"{place}: {a!r} and {b!r}"]


def compare_checkpoints(left: Path, right: Path) -> int:
    """Assert that two checkpoints hold the same files and states; returns how many files were compared."""
    names = sorted(json.loads((left / "complete.json").read_text())["files"])
    assert names == sorted(json.loads((right / "complete.json").read_text())["files"])
    compared = 0
    for name in (name for name in names if name.endswith(".pt")):
        a, b = (torch.load(side / name, weights_only=False) for side in (left, right))
        assert differences(a, b, name) == []
        compared += 1
    return compared


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (2, 2),
        pytest.param(1, 0, marks=pytest.mark.full),
        pytest.param(1, 2, marks=pytest.mark.full),
        pytest.param(2, 3, marks=pytest.mark.full),
    ],
)
def test_it_holds_the_state_of_its_step(tmp_path: Path, ranks: int, stage: int) -> None:
    """The disk is slow here: steps go by while each is written, and the next save waits for it."""
    made = content(tmp_path, deepspeed__zero_optimization__stage=stage)
    path = write_recipe(tmp_path / "recipe.yaml", made)
    once = ["checkpoint.0.asynchronous=true"]
    jobs = [
        {"recipe": str(path), "output_dir": str(tmp_path / name), "overrides": words, "resume": resume}
        for name, words, resume in (
            ("at-once", [], ""), ("behind", once, ""), ("again", [*once, "train_iters=8"], ""),
        )
    ]  # fmt: skip
    # the third is cut short after its fifth step and goes on from a checkpoint that was written behind it
    jobs[2]["overrides"] = [*once, "exit_iteration=5"]
    jobs.append({**jobs[2], "overrides": once, "resume": "step-3"})
    drive(jobs, ranks=ranks, folder=tmp_path)
    folders = {name: tmp_path / name for name in ("at-once", "behind", "again")}
    for step in (3, 6, 8):
        found = [folder / "checkpoints" / f"step-{step}" for folder in folders.values()]
        assert compare_checkpoints(found[0], found[1]) >= 1 + ranks
        assert compare_checkpoints(found[0], found[2]) >= 1 + ranks
    straight = without_clocks(folders["at-once"])
    assert without_clocks(folders["behind"]) == without_clocks(folders["again"]) == straight
    for rank in range(ranks):
        told = [line.split() for line in
                (folders["behind"] / f"told-{rank}.txt").read_text().splitlines()]  # fmt: skip
        assert [(name, complete) for name, _, complete in told] == [
            ("step-3", "True"), ("step-6", "True"), ("step-8", "True"),
        ]  # fmt: skip
        assert int(told[0][1]) > 3  # training went on meanwhile
    assert (folders["behind"] / "checkpoints" / "latest").read_text() == "step-8\n"
    leftovers = [p.name for p in (folders["behind"] / "checkpoints").glob("*.partial")]
    assert leftovers == []


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_while_it_is_written_nothing_complete_is_lost(tmp_path: Path, ranks: int) -> None:
    made = content(tmp_path, deepspeed__zero_optimization__stage=2)
    made["checkpoint"][0] |= {"asynchronous": True, "auto_resume": True, "keep_last": 1}
    path = write_recipe(tmp_path / "recipe.yaml", made)
    words = [str(path), *([] if ranks == 1 else ["--num_gpus", str(ranks)])]

    def run(name: str) -> list[str]:
        return [words[0], f"output_dir={tmp_path / name}", *words[1:]]

    done = arctic_train(*run("straight"), cwd=tmp_path, SLOW_SECONDS="0")
    assert done.returncode == 0, done.stderr[-3000:]
    killed = tmp_path / "killed"
    checkpoints = killed / "checkpoints"

    def moment() -> bool:
        begun = (checkpoints / "step-6.partial" / "run.json").exists()
        steps = killed / "metrics.jsonl"
        return begun and steps.exists() and steps.read_bytes().count(b"\n") >= 7

    os.environ["SLOW_SECONDS"] = "3"
    try:
        kill_when([sys.executable, "-m", "arctic_like.cli.main", *run("killed")], moment,
                  run=killed, cwd=tmp_path)  # fmt: skip
    finally:
        del os.environ["SLOW_SECONDS"]
    assert (
        checkpoints / "step-3" / "complete.json"
    ).exists()  # the old one stays until the new one stands
    assert not (checkpoints / "step-6").exists()
    assert len(lines(killed)) > 6  # steps behind the checkpoint had been done
    done = arctic_train(*run("killed"), cwd=tmp_path, SLOW_SECONDS="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert without_clocks(killed) == without_clocks(tmp_path / "straight")
    assert compare_checkpoints(tmp_path / "straight/checkpoints/step-8", checkpoints / "step-8")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_disk_that_is_full_ends_the_run_and_leaves_what_was_complete(
    tmp_path: Path, ranks: int
) -> None:
    made = content(tmp_path, deepspeed__zero_optimization__stage=2)
    made["checkpoint"][0]["asynchronous"] = True
    path = write_recipe(tmp_path / "recipe.yaml", made)
    ways = [] if ranks == 1 else ["--num_gpus", "2"]
    done = arctic_train(
        str(path), f"output_dir={tmp_path / 'run'}", *ways, cwd=tmp_path, SLOW_SECONDS="0.1",
        FAIL_AT="step-6.partial", FAIL_RANK=str(ranks - 1),
    )  # fmt: skip
    assert done.returncode != 0
    assert "step-6 could not be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    saved = tmp_path / "run" / "checkpoints"
    assert (saved / "latest").read_text() == "step-3\n"
    assert not (saved / "step-6").exists()


@pytest.mark.full
def test_a_run_that_fails_completes_what_was_being_written(tmp_path: Path) -> None:
    made = content(tmp_path)
    made["checkpoint"][0]["asynchronous"] = True
    made["callbacks"].append({"type": "told_off"})
    (tmp_path / "slow.py").write_text(
        SLOW + "\nclass Off(Callback):\n    name = 'told_off'\n"
        "    def on_step_end(self, trainer):\n"
        "        if trainer.global_step == 4:\n            raise ValueError('off')\n"
    )
    path = write_recipe(tmp_path / "recipe.yaml", made)
    done = arctic_train(str(path), f"output_dir={tmp_path / 'run'}", cwd=tmp_path, SLOW_SECONDS="2")
    assert done.returncode != 0
    assert "off" in done.stderr
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-3\n"
    assert time.time() - (tmp_path / "run/checkpoints/step-3/complete.json").stat().st_mtime < 60
