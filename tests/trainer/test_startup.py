"""From the command to the first step: the parts add up, and are kept with the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from arctic_like.cli.startup import process_began
from arctic_like.trainer.startup import COMMAND_STARTED, StartUp
from tests.integration.tools import arctic_train, recipe, write_conversations, write_recipe


def test_parts_of_several_learners_count_together_and_small_ones_are_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [102.0]
    monkeypatch.setenv(COMMAND_STARTED, "100.0")
    start_up = StartUp(lambda: now[0])
    assert COMMAND_STARTED not in os.environ, "a second run of the process has another start"
    for name, seconds in (("imports", 3.0), ("model", 1.0), ("critic.model", 2.0), ("data", 0.04)):
        now[0] += seconds
        start_up.lap(name)
    assert start_up.seconds == pytest.approx(
        {"launch": 2.0, "imports": 3.0, "model": 3.0, "data": 0.04}
    )
    assert start_up.total == pytest.approx(8.04)
    assert start_up.sentence() == (
        "first step 8.0 s after the start: launch 2.0, imports 3.0, model 3.0"
    )


def test_a_process_knows_when_it_began() -> None:
    import psutil

    assert process_began() == pytest.approx(psutil.Process().create_time(), abs=1.1)  # it rounds


def test_a_command_says_and_keeps_what_its_start_took(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl")
    content: dict[str, Any] = recipe(data, logger__level="INFO", train_iters=2)
    content["output_dir"] = str(tmp_path / "run")
    began = time.time()
    done = arctic_train(str(write_recipe(tmp_path / "recipe.yaml", content)), cwd=tmp_path)
    took = time.time() - began
    assert done.returncode == 0, done.stderr
    (start,) = json.loads((tmp_path / "run/environment.json").read_text())["starts"]
    found = dict(start["start_up"])
    total = found.pop("total")
    assert sum(found.values()) == pytest.approx(total, abs=0.01)
    assert {"launch", "imports", "tokenizer", "data", "model", "engine", "first step"} <= set(found)
    assert 0.1 < found["launch"] < total < took
    said = [line for line in (done.stdout + done.stderr).splitlines() if "first step" in line]
    assert len(said) == 1
    assert f"first step {total:.1f} s after the start: launch" in said[0]
