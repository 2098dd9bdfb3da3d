"""Spikes: what is one, and that a run which goes back is the run that never met the spoilt batches."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.callbacks.spikes import SpikeConfig, SpikeDetection, robust_score
from arctic_like.checkpoint.reading import read_weights
from arctic_like.errors import NonFiniteError, RecipeError, RunError
from arctic_like.stop import StopRequest
from tests.callbacks import runs
from tests.integration.tools import (
    lines,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)  # fmt: skip

REWIND = {"type": "spike_detection", "action": "rewind", "min_lines": 2, "threshold": 30}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("spikes") / "data.jsonl", count=24)


def spiking(data: Path, bad: list[int], **changes: Any) -> dict[str, Any]:
    """Twelve samples an epoch in batches of 2, dropout, a checkpoint every 2 steps."""
    settings: dict[str, Any] = {
        "type": "test_spiking",
        "bad_positions": bad,
        "gradient_accumulation_steps": 2,
        "data__pack_samples": False,
        "data__longest_first": False,
        "train_iters": 8,
        "model__config": {**recipe(data)["model"]["config"], "attention_dropout": 0.2},
        "checkpoint": [
            {"type": "deepspeed", "save_every_n_steps": 2, "save_end_of_training": True}
        ],
        "callbacks": [REWIND],
    }
    return recipe(data, **settings | changes)


def reference(
    folder: Path, content: dict[str, Any], skipped: list[int]
) -> tuple[Path, list[list[int]]]:
    """The same recipe, with the spoilt batches known from the beginning; (run, samples of each step)."""
    seen: list[list[int]] = []

    def know(trainer: Any) -> None:
        trainer.progress.skipped = skipped
        step = trainer.step

        def watched(micro_batches: Any) -> None:
            seen.append(sorted(i for m in micro_batches for i in m.samples))
            step(micro_batches)

        trainer.step = watched

    path = write_recipe(folder / "reference.yaml", content)
    run = folder / "reference"
    execute(load_recipe(path), output_dir=run, resume="", stop=StopRequest(), inspect=know)
    return run, seen


def test_the_score_is_the_modified_z_score() -> None:
    """Of a normal sample it is the z-score; a few outliers in the window hardly change it."""
    draw = random.Random(3)
    window = [draw.gauss(5.0, 2.0) for _ in range(4001)]
    assert robust_score(11.0, window) == pytest.approx(3.0, rel=0.05)
    assert robust_score(11.0, window + [1e9] * 20) == pytest.approx(3.0, rel=0.07)
    middle = np.median(window)
    mad = np.median(np.abs(np.asarray(window) - middle))
    assert robust_score(7.0, window) == pytest.approx((7.0 - middle) / (mad * 1.4826))
    assert pytest.approx(1 / NormalDist().inv_cdf(0.75), rel=1e-4) == 1.4826
    assert robust_score(1.02, [1.0] * 9) == pytest.approx(2.0)  # the floor: 1 % of the median
    assert robust_score(-0.98, [-1.0] * 9) == pytest.approx(2.0)
    assert robust_score(1.0, []) == 0
    assert robust_score(0.0, [0.0] * 5) == 0
    assert robust_score(1e-9, [0.0] * 5) == math.inf


def test_the_ratio_to_the_moving_average_is_bounded_by_what_was_a_spike() -> None:
    detector = SpikeDetection(SpikeConfig(method="ema", threshold=3, watch=["loss"]))
    for value in (2.0, 2.0, 100.0):
        told = detector._describe("loss", value)
        detector._take_in("loss", value)
    assert told == "loss is 100, 50 times its moving average"
    assert detector._averages["loss"] == pytest.approx(0.9 * 2 + 0.1 * 6)
    assert detector._describe("loss", 7.0) == ""
    assert detector._describe("loss", math.inf) == "loss is inf"


@pytest.mark.parametrize("factor", ["nan", 1000.0])
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_that_goes_back_is_the_run_that_never_met_the_batch(
    tmp_path: Path, data: Path, factor: Any, stage: int
) -> None:
    """Two spoilt batches in a row, the last of the first epoch and the first of the second (positions
    22 and 24 of 24 samples; steps 12 and 13), and one inside; bit for bit, lines and weights."""
    content = spiking(
        data, [10, 22, 24], bad_factor=factor, train_iters=16, eval_interval="1 epoch",
        data__eval_sources=[str(data)], deepspeed__zero_optimization__stage=stage,
    )  # fmt: skip
    result = runs.train(tmp_path, content)
    assert result.steps == 16
    run = tmp_path / "run"
    record = json.loads((run / "checkpoints/rewinds.json").read_text())
    assert record == {"skipped": [10, 22, 24], "rewinds": {"step-4": 1, "step-10": 2}}
    other, seen = reference(tmp_path, content, [10, 22, 24])
    assert without_clocks(run) == without_clocks(other)
    assert [line["step"] for line in train_lines(run)] == list(range(1, 17))
    assert [line["samples_seen"] for line in train_lines(run)][4:6] == [10, 14]
    assert len([line for line in lines(run) if "epoch_train_loss" in line]) == 1
    assert sum(len(batch) for batch in seen) == 32
    mine, theirs = (read_weights(folder / "checkpoints/step-16") for folder in (run, other))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    state = json.loads((run / "checkpoints/step-16/run.json").read_text())
    assert state["progress"]["position"] == 38
    assert state["progress"]["skipped"] == [10, 22, 24]


def test_with_a_line_every_few_steps_all_batches_since_the_line_before_are_passed_over(
    tmp_path: Path, data: Path
) -> None:
    """A spike in step 8 (position 14), seen at the line of step 9: 7, 8 and 9 go, and the checkpoint of step
    8, which is spoilt. A loss that is not finite names its step: that batch alone goes."""
    content = spiking(data, [14], train_iters=15, train_log_iter_interval=3)
    runs.train(tmp_path, content)
    run = tmp_path / "run"
    record = json.loads((run / "checkpoints/rewinds.json").read_text())
    assert record == {"skipped": [12, 14, 16], "rewinds": {"step-6": 1}}
    other, _ = reference(tmp_path, content, [12, 14, 16])
    assert without_clocks(run) == without_clocks(other)
    exact = spiking(data, [14], train_iters=15, train_log_iter_interval=3, bad_factor="nan")
    runs.train(tmp_path, exact, name="exact")
    record = json.loads((tmp_path / "exact/checkpoints/rewinds.json").read_text())
    assert record == {"skipped": [14], "rewinds": {"step-6": 1}}


def test_it_goes_back_to_one_place_only_so_often(tmp_path: Path, data: Path) -> None:
    content = spiking(
        data, list(range(8, 24)), bad_factor="nan", callbacks=[{**REWIND, "max_rewinds": 2}]
    )
    with pytest.raises(RunError, match=r"went back to step-4 2 times already") as caught:
        runs.train(tmp_path, content)
    assert not isinstance(caught.value, NonFiniteError)
    assert "positions 8, 10, 12" in str(caught.value)


def test_without_a_checkpoint_before_it(tmp_path: Path, data: Path) -> None:
    """A NaN ends the run as ever; a spike is warned of."""
    with pytest.raises(NonFiniteError, match="step 1"):
        runs.train(tmp_path, spiking(data, [0], bad_factor="nan"))
    content = spiking(data, [6], train_iters=5)
    content["checkpoint"][0]["save_every_n_steps"] = 100
    assert runs.train(tmp_path, content, name="spike").steps == 5
    assert "there is no checkpoint before it" in (tmp_path / "spike/logs/rank-0.log").read_text()


def test_warn_and_stop(tmp_path: Path, data: Path) -> None:
    """Warnings change nothing. A stop leaves a checkpoint and the reason."""
    content = spiking(data, [8], callbacks=[{**REWIND, "action": "warn"}])
    runs.train(tmp_path, content)
    told = (tmp_path / "run/logs/rank-0.log").read_text()
    assert told.count("spike at step 5: loss is") == 1
    plain = spiking(data, [8], callbacks=[])
    runs.train(tmp_path, plain, name="plain")
    assert without_clocks(tmp_path / "run") == without_clocks(tmp_path / "plain")
    content["callbacks"] = [{**REWIND, "action": "stop"}]
    result = runs.train(tmp_path, content, name="stop")
    assert (result.steps, result.stop_reason, result.complete) == (5, "spike", False)
    assert result.checkpoint == tmp_path / "stop/checkpoints/step-5"


def test_what_is_refused(tmp_path: Path, data: Path) -> None:
    content = spiking(data, [], overfit_first_batch=True, train_log_iter_interval=0)
    content["checkpoint"] = []
    with pytest.raises(RecipeError) as caught:
        runs.train(tmp_path, content)
    for place in ("train_log_iter_interval", "checkpoint", "overfit_first_batch"):
        assert place in str(caught.value)
    named = spiking(data, [], callbacks=[{**REWIND, "watch": ["los"]}])
    with pytest.raises(RunError, match="watches los, but a train line has loss, learning_rate"):
        runs.train(tmp_path, named, name="named")
