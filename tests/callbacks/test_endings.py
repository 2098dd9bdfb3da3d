"""What a run leaves for others at its end: `result.json`, the loss that a search ranks by, the best step."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import arctic_like
from arctic_like import load_recipe
from arctic_like.checkpoint.reading import read_weights
from arctic_like.cli.train import _take_step
from arctic_like.errors import CheckpointError, NonFiniteError, RecipeError
from arctic_like.inference import find
from arctic_like.trainer.result_file import as_json
from tests.callbacks import runs
from tests.integration.tools import recipe, write_conversations, write_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("endings") / "data.jsonl", count=24)


def result_of(run: Path) -> dict[str, Any]:
    """Parsed as strict JSON: no NaN, no Infinity."""
    text = (run / "result.json").read_text()
    content: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return content


def test_infinite_numbers_are_json_that_parses_to_infinity() -> None:
    text = as_json({"a": math.inf, "b": [-math.inf, math.nan, 1.5], "c": "infinity", "d": 3})
    found = json.loads(text, parse_constant=pytest.fail)
    assert found == {"a": math.inf, "b": [-math.inf, None, 1.5], "c": "infinity", "d": 3}
    assert "1e999" in text


def test_a_finished_run(tmp_path: Path, data: Path) -> None:
    content = recipe(
        data, eval_at_end=True, data__train_eval_split=[0.9, 0.1],
        checkpoint=[{"type": "deepspeed", "save_end_of_training": True}],
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    loss = arctic_like.fit(load_recipe(path), output_dir=tmp_path / "run")
    found = result_of(tmp_path / "run")
    assert found["final_loss"] == loss == found["metrics"]["eval/loss"]
    assert (found["steps"], found["stop_reason"], found["complete"]) == (4, "finished", True)
    assert found["checkpoint"] == str(tmp_path / "run/checkpoints/step-4")
    assert found["best"] == {"eval/loss": loss}


def test_a_run_that_blew_up_has_an_infinite_loss(tmp_path: Path, data: Path) -> None:
    """Although a finite one was measured before; `fit` returns it, `run` raises."""
    content = recipe(
        data, type="test_spiking", bad_positions=[2], bad_factor="nan", eval_interval=1,
        data__train_eval_split=[0.9, 0.1], data__pack_samples=False,
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 1}],
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    assert arctic_like.fit(load_recipe(path), output_dir=tmp_path / "run") == math.inf
    found = result_of(tmp_path / "run")
    assert (found["final_loss"], found["stop_reason"]) == (math.inf, "non_finite")
    assert math.isfinite(found["metrics"]["eval/loss"])
    assert found["steps"] == 3
    assert found["error"].startswith("NonFiniteError: the loss of step 3 is nan")
    assert found["checkpoint"] == str(tmp_path / "run/checkpoints/step-2")
    with pytest.raises(NonFiniteError):
        runs.train(tmp_path, content, name="other")


def test_any_other_error_is_in_the_result_and_a_new_start_removes_it(
    tmp_path: Path, data: Path
) -> None:
    content = recipe(
        data, callbacks=[{"type": "test_one_rank", "rank": 0, "step": 2, "do": "break"}]
    )
    with pytest.raises(ZeroDivisionError):
        runs.train(tmp_path, content)
    found = result_of(tmp_path / "run")
    assert (found["stop_reason"], found["final_loss"]) == ("error", math.inf)
    assert found["error"] == "ZeroDivisionError: a defect in a callback"
    content["overwrite"] = True
    content["callbacks"][0]["do"] = "stop"
    result = runs.train(tmp_path, content)
    assert (result.stop_reason, result.complete) == ("enough", False)
    found = result_of(tmp_path / "run")
    assert (found["stop_reason"], found["steps"], "error" in found) == ("enough", 2, False)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, dict[str, Any]]:
    """A run whose best of six steps is the fourth, saved at every step and once more at the end."""
    folder = tmp_path_factory.mktemp("scored")
    content = recipe(
        data, train_iters=6, eval_interval=1, metric_monitor="score", data__train_eval_split=[0.9, 0.1],
        callbacks=[{"type": "test_scripted", "scores": [0.1, 0.2, 0.1, 0.4, "nan", 0.3]}],
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 1}],
    )  # fmt: skip
    runs.train(folder, content)
    return folder, content


def copied(scored: tuple[Path, dict[str, Any]], folder: Path) -> dict[str, Any]:
    shutil.copytree(scored[0], folder, dirs_exist_ok=True)
    return dict(scored[1])


def test_the_best_is_found_by_name(scored: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """In a run directory for export and chat; and to go on from."""
    content = copied(scored, tmp_path)
    run = tmp_path / "run"
    assert find(run, step="best").folder == run / "checkpoints/step-4"
    assert find(run).folder == run / "checkpoints/step-6"
    assert _take_step(["RUN", "--step", "best", "a=b"]) == (["RUN", "a=b"], "best")
    assert _take_step(["RUN", "--step=07"]) == (["RUN"], "7")
    result = runs.train(tmp_path, content, resume="best")
    assert result.steps == 6
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert [n for n in names if n.startswith("super")] == ["superseded-step-5", "superseded-step-6"]
    straight, again = (read_weights(f / "run/checkpoints/step-6") for f in (scored[0], tmp_path))
    assert all(bool((straight[name] == again[name]).all()) for name in straight)


def test_no_best_where_nothing_was_evaluated(tmp_path: Path, data: Path) -> None:
    content = recipe(data, checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}])
    runs.train(tmp_path, content)
    assert not (tmp_path / "run/checkpoints/best").exists()
    with pytest.raises(CheckpointError, match="none is best; complete are: step-2, step-4"):
        runs.train(tmp_path, content, resume="best")
    with pytest.raises(RecipeError, match="none is best"):
        find(tmp_path / "run", step="best")


def test_where_every_checkpoint_is_damaged_nothing_is_cleared(
    scored: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """With auto_resume a run goes on from the newest whole one, and where none is whole it says so."""
    content = copied(scored, tmp_path)
    content["checkpoint"][0]["auto_resume"] = True
    content["train_iters"] = 7
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step-6/run.json").unlink()
    (checkpoints / "step-5/complete.json").unlink()
    shutil.rmtree(checkpoints / "step-4/engine")
    for number in (1, 2, 3):
        next((checkpoints / f"step-{number}/engine").iterdir()).write_text("")
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    (tmp_path / "run/exports").mkdir()
    with pytest.raises(CheckpointError) as caught:
        runs.train(tmp_path, content)
    told = str(caught.value)
    assert "none is complete" in told
    assert "step-5: complete.json is missing" in told
    assert "step-6: run.json is missing" in told
    assert "overwrite=true" in told
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "run/exports").is_dir()
    shutil.copy(scored[0] / "run/checkpoints/step-6/run.json", checkpoints / "step-6/run.json")
    assert runs.train(tmp_path, content).steps == 7
