"""Several ranks: one that asks stops all, one that breaks ends all; killed runs that watch and go back."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_resume import counted, kill_when
from tests.integration.tools import (
    arctic_train,
    drive,
    lines,
    recipe,
    without_clocks,
    write_conversations,
    write_recipe,
)  # fmt: skip

CODE = str(Path(__file__).with_name("parts.py"))


def watched(data: Path, **changes: Any) -> dict[str, Any]:
    """Accumulation, dropout, evaluations, spoilt batches at positions 20 and 28 (steps 6 and 8 of those
    that meet them), the best kept, and early stopping at the tenth step."""
    settings: dict[str, Any] = {
        "type": "test_spiking",
        "code": CODE,
        "bad_positions": [20, 28],
        "gradient_accumulation_steps": 2,
        "train_iters": 40,
        "data__pack_samples": False,
        "data__train_eval_split": [0.9, 0.1],
        "eval_interval": 2,
        "metric_monitor": "score",
        "model__config": {**recipe(data)["model"]["config"], "attention_dropout": 0.2},
        "deepspeed__zero_optimization__stage": 2,
        "checkpoint": [
            {"type": "deepspeed", "save_every_n_steps": 4, "keep_last": 1, "save_best": True,
             "save_end_of_training": True, "auto_resume": True}
        ],
        "callbacks": [
            {"type": "test_scripted", "scores": [0.1, 0.6, 0.5, 0.4, "nan"]},
            {"type": "early_stopping", "patience": 3, "stop_on_non_finite": False},
            {"type": "spike_detection", "action": "rewind", "min_lines": 2, "threshold": 30},
        ],
    }  # fmt: skip
    return recipe(data, **settings | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of two ranks: a stop asked for on rank 1; watching at ZeRO 2 and 3."""
    folder = tmp_path_factory.mktemp("ranks")
    data = write_conversations(folder / "data.jsonl", count=40)
    asks = {"type": "test_one_rank", "rank": 1, "step": 3, "do": "stop"}
    jobs = []
    for name, content in {
        "asked": recipe(data, code=CODE, train_iters=8, gradient_accumulation_steps=2, callbacks=[asks],
                        checkpoint=[{"type": "deepspeed"}]),
        "two": watched(data),
        "three": watched(data, deepspeed__zero_optimization__stage=3),
    }.items():  # fmt: skip
        path = write_recipe(folder / f"{name}.yaml", content)
        jobs.append({"recipe": str(path), "output_dir": str(folder / name)})
    drive(jobs, ranks=2, folder=folder)
    return folder


def facts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "facts.json").read_text())
    return found


def test_one_rank_asks_and_all_stop_at_the_same_step(folder: Path) -> None:
    """With its own word for the reason, which rank zero learns; the checkpoint has both ranks' states."""
    found = facts(folder / "asked")
    assert (found["steps"], found["stop_reason"]) == (3, "enough")
    assert len(found["samples"]) == 3  # on every rank: the lists are zipped strictly
    ranks = (folder / "asked/checkpoints/step-3/ranks").iterdir()
    assert sorted(path.name for path in ranks) == ["rank-0.pt", "rank-1.pt"]


def test_watching_is_right_on_two_ranks(folder: Path) -> None:
    """A metric that rank zero alone knows stops both; both pass over the same batches."""
    for name in ("two", "three"):
        found = facts(folder / name)
        assert (found["steps"], found["stop_reason"]) == (10, "early_stopping")
        record = json.loads((folder / name / "checkpoints/rewinds.json").read_text())
        assert record == {"skipped": [20, 28], "rewinds": {"step-4": 2}}
        kept = {path.name for path in (folder / name / "checkpoints").glob("step-*")}
        assert kept == {"step-4", "step-10"}
        assert (folder / name / "checkpoints/best").read_text() == "step-4\n"


@pytest.mark.full
@pytest.mark.parametrize("name", ["two", "three"])
def test_a_run_that_goes_back_and_is_killed_is_the_run_that_was_not(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """Killed with -9 right after it went back; early stopping ends both at the same step,
    with the same lines and the same scores."""
    run = tmp_path / "killed"
    recipe_file = str(folder / f"{name}.yaml")
    words = [recipe_file, f"output_dir={run}", "--num_gpus", "2"]
    command = [sys.executable, "-m", "arctic_like.cli.main", *words]

    def went_back(times: int) -> Any:
        record = run / "checkpoints/rewinds.json"
        return lambda: record.exists() and len(json.loads(record.read_text())["skipped"]) >= times

    kill_when(command, went_back(1), run=run, cwd=tmp_path)
    assert counted(run) < len(lines(folder / name))
    again = arctic_train(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert without_clocks(run) == without_clocks(folder / name)
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["stop_reason"], result["complete"]) == (
        10,
        "early_stopping",
        True,
    )
    straight = json.loads((folder / name / "result.json").read_text())
    assert {k: result[k] for k in ("best", "final_loss")} == {
        k: straight[k] for k in ("best", "final_loss")
    }


def test_an_error_on_one_rank_ends_all_within_seconds_and_is_shown_first(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=24)
    breaks = {"type": "test_one_rank", "rank": 1, "step": 3, "do": "break"}
    content = recipe(data, code=CODE, train_iters=100_000, callbacks=[breaks])
    path = write_recipe(tmp_path / "recipe.yaml", content)
    run = tmp_path / "run"
    done = arctic_train(str(path), f"output_dir={run}", "--num_gpus", "2", cwd=tmp_path)
    ended = time.time()
    assert done.returncode == 1
    assert ended - (run / "metrics.jsonl").stat().st_mtime < 20
    assert lines(run)[-1]["step"] == 2  # the line of step 3 needs both ranks
    shown = done.stderr
    assert "in callback 'test_one_rank' at on_step_end" in shown
    assert "ZeroDivisionError: a defect in a callback" in shown
    first = shown.index("Traceback")
    assert shown.index("ZeroDivisionError") < (
        shown.find("Traceback", first + 1) % (len(shown) + 1)
    )
