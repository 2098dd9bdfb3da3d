"""The average of the weights against a hand-written loop in float64, on two ranks at every stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arctic_like import load_recipe, run
from tests.integration.test_learners import example
from tests.integration.test_resume import counted, kill_when
from tests.integration.tools import (
    arctic_train,
    drive,
    lines,
    recipe,
    without_clocks,
    write_conversations,
    write_recipe,
)

pytestmark = pytest.mark.full

CASES = {"0-bf16": (0, "bf16"), "1-bf16": (1, "bf16"), "2-fp32": (2, "fp32"), "3-bf16": (3, "bf16")}
EMA = {"type": "ema", "decay": 0.9}


def content(data: Path, stage: int, dtype: str, **changes: Any) -> dict[str, Any]:
    """Five steps of accumulation 2 on two ranks; evaluated after 2, 4 and 5."""
    made = recipe(
        data, train_iters=5, global_batch_size=4, model__dtype=dtype, eval_interval=2,
        eval_at_end=True, data__train_eval_split=[0.8, 0.2], data__pack_samples=False,
        deepspeed__zero_optimization__stage=stage, callbacks=[EMA],
    )  # fmt: skip
    del made["gradient_accumulation_steps"]
    return {**made, **changes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    data = write_conversations(folder / "data.jsonl", count=30)
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def add(name: str, made: dict[str, Any], ranks: int = 2, **more: Any) -> None:
        path = write_recipe(folder / f"{name}.yaml", made)
        run = folder / more.pop("run", name)
        jobs[ranks].append({"recipe": str(path), "output_dir": str(run), **more})

    export = [{"type": "huggingface", "save_end_of_training": True}]
    watched = {"code": str(Path(__file__).with_name("watching.py")), "checkpoint": export}
    for name, (stage, dtype) in CASES.items():
        add(
            name, content(data, stage, dtype, callbacks=[EMA, {"type": "watch_average"}], **watched)
        )
    saved = {"checkpoint": [{"type": "deepspeed", "save_every_n_steps": 3}]}
    for stage in (0, 2, 3):
        made = content(data, stage, "fp32", **saved)
        add(f"whole-{stage}", made)
        add(f"stopped-{stage}", {**made, "exit_iteration": 3})
        if stage == 2:  # and on one rank: what two ranks saved becomes one whole
            add("first", {**made, "exit_iteration": 3})
            add("then", made, ranks=1, run="first", resume="latest")
        add(f"resumed-{stage}", made, run=f"stopped-{stage}", resume="latest")
    drive(jobs[2], ranks=2, folder=folder, timeout=600)
    drive(jobs[1], ranks=1, folder=folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_average_is_what_is_evaluated_and_exported(runs: Path, name: str) -> None:
    facts = json.loads((runs / name / "average.json").read_text())
    rounding = 2.0**-8 if name.endswith("bf16") else 1e-6
    assert len(facts["evaluated"]) == 3
    assert max(facts["evaluated"]) < rounding
    assert min(facts["far"]) > 5e-4, "the last weights would do as well"
    assert facts["put_back"] == [True] * len(facts["put_back"])
    export = runs / name / "exports" / "step-5"
    average = torch.load(runs / name / "average.pt")
    weights = load_file(export / "model.safetensors")
    for key, value in average.items():
        found = weights[key].double()
        assert float((found - value).abs().max()) < rounding * float(value.abs().max()), key


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_average_is_the_one_that_went_on(runs: Path, stage: int) -> None:
    whole, stopped = (without_clocks(runs / f"{n}-{stage}") for n in ("whole", "stopped"))
    assert stopped == whole
    assert any("eval/loss" in line for line in whole[-3:])


def test_what_two_ranks_averaged_goes_on_on_one(runs: Path) -> None:
    whole, one = (
        [line["eval/loss"] for line in lines(runs / n) if "eval/loss" in line]
        for n in ("whole-2", "first")
    )
    assert one == pytest.approx(whole, rel=2e-5)


def test_the_average_follows_rows_that_come_and_go(tmp_path: Path) -> None:
    """The same in place (stage 0) and through rebuilt engines, and not that of the last weights."""

    def evaluated(name: str, stage: int, *callbacks: dict[str, Any]) -> list[float]:
        made = {**example("splats"), "callbacks": list(callbacks), "eval_interval": 5}
        made["deepspeed"] = {**made.get("deepspeed", {}), "zero_optimization": {"stage": stage}}
        path = write_recipe(tmp_path / f"{name}.yaml", made)
        run(load_recipe(path, []), output_dir=tmp_path / name)
        return [line["eval/loss"] for line in lines(tmp_path / name) if "eval/loss" in line]

    whole = evaluated("0", 0, EMA)
    assert len(whole) >= 2
    for stage in (2, 3):
        assert evaluated(str(stage), stage, EMA) == pytest.approx(whole, rel=1e-4)
    assert whole != pytest.approx(evaluated("plain", 0), rel=1e-3)


def test_a_killed_average_is_the_one_that_was_never_killed(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=30)
    made = content(
        data, 0, "fp32", global_batch_size=2, train_iters=40,
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 4, "auto_resume": True}],
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", made)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert arctic_train(str(path), f"output_dir={whole}", cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "arctic_like.cli.main", str(path), f"output_dir={killed}"]
    kill_when(command, lambda: counted(killed) > 12, run=killed, cwd=tmp_path)
    assert 12 < counted(killed) < counted(whole)
    assert arctic_train(str(path), f"output_dir={killed}", cwd=tmp_path).returncode == 0
    assert without_clocks(killed) == without_clocks(whole)
