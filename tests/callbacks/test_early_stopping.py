"""Early stopping: what counts as better, when it ends, and that a resume ends at the same step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.callbacks.watching import improved
from arctic_like.config.delta import Delta
from arctic_like.errors import RecipeError, RunError
from tests.callbacks import runs
from tests.integration.tools import lines, recipe, write_conversations

train = runs.train
NAN = math.nan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("stopping") / "data.jsonl", count=24)


def scripted(data: Path, scores: list[Any], *, steps: int = 12, **stopping: Any) -> dict[str, Any]:
    """A run that evaluates after every step and measures `scores`, higher is better."""
    return recipe(
        data, train_iters=steps, eval_interval=1, metric_monitor="score", data__train_eval_split=[0.9, 0.1],
        callbacks=[{"type": "early_stopping", **stopping}, {"type": "test_scripted", "scores": scores}],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "best", "mode", "delta", "better"),
    [
        (-1.05, -1.0, "min", "1%", True),  # 5 % lower, below 0
        (-1.005, -1.0, "min", "1%", False),
        (-0.95, -1.0, "max", "1%", True),
        (-0.995, -1.0, "max", "1%", False),
        (-1.05, -1.0, "max", "1%", False),
        (0.5, 1.0, "min", 0.5, False),  # not more than it
        (0.98, 1.0, "min", 0.01, True),
        (0.0, -1e-9, "max", "50%", True),
        (-1e-9, 0.0, "min", "50%", True),  # a share of 0 is 0
        (1.0, 1.0, "min", 0, False),
        (NAN, 1.0, "min", 0, False),
        (1.0, NAN, "min", 0, True),
        (1.0, None, "max", 0.5, True),
        (math.inf, None, "min", "1%", True),
        (1.0, math.inf, "min", "1%", True),
        (-math.inf, -1.0, "max", "1%", False),
    ],
)
def test_what_is_better(
    value: float, best: float | None, mode: Any, delta: Any, better: bool
) -> None:
    assert improved(value, best, mode, Delta.of(delta)) is better


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1), st.booleans())
def test_directions_mirror_each_other(value: float, best: float, delta: float, share: bool) -> None:
    """min of a metric is max of its negative, relative deltas included; and no two are better than each
    other."""
    difference = Delta(delta, share)
    down = improved(value, best, "min", difference)
    assert down == improved(-value, -best, "max", difference)
    assert not (down and improved(value, best, "max", difference))
    assert Delta.of(difference.dump()) == difference


def test_it_stops_after_so_many_evaluations_without_improvement(tmp_path: Path, data: Path) -> None:
    """The best is at 2; 3, 4 and 5 are not better by 1 %; everything of the end is done but no step."""
    content = scripted(data, [0.5, 0.8, 0.805, 0.7, 0.8], patience=3, min_delta="1%")
    content |= {
        "eval_at_end": True,
        "checkpoint": [
            {"type": "deepspeed"},
            {"type": "huggingface", "save_end_of_training": True},
        ],
    }
    result = train(tmp_path, content)
    assert (result.steps, result.stop_reason, result.complete) == (5, "early_stopping", True)
    assert result.exports == (tmp_path / "run/exports/step-5",)
    assert lines(tmp_path / "run")[-1]["step"] == 5
    assert result.best["eval/score"] == 0.805
    assert result.final_loss == 0.8  # the monitored metric's last value


def test_a_run_that_has_waited_long_enough_stops_again_unless_it_is_given_more_patience(
    tmp_path: Path, data: Path
) -> None:
    content = scripted(data, [0.5, 0.4, 0.4, 0.4], patience=2, steps=8)
    content["checkpoint"] = [{"type": "deepspeed", "save_end_of_training": True}]
    assert train(tmp_path, content).steps == 3
    again = train(tmp_path, content, resume="latest")
    assert (again.steps, again.stop_reason) == (3, "early_stopping")
    content["callbacks"][0]["patience"] = 4
    more = train(tmp_path, content, resume="latest")
    assert (more.steps, more.stop_reason) == (5, "early_stopping")
    assert more.checkpoint == tmp_path / "run/checkpoints/step-5"
    content["callbacks"][0]["patience"] = 50
    rest = train(tmp_path, content, resume="latest")
    assert (rest.steps, rest.stop_reason) == (8, "finished")
    assert rest.checkpoint == tmp_path / "run/checkpoints/step-8"


@pytest.mark.parametrize(
    ("scores", "settings", "steps", "reason"),
    [
        ([0.9, 0.1], {"patience": 2, "warmup": 3}, 5, "early_stopping"),  # 0.1 at 3 is the best
        (
            [0.9, 0.1],
            {"patience": 2, "warmup": "50%"},
            8,
            "early_stopping",
        ),  # of 12: from step 6 on
        ([0.9, 0.1], {"patience": 1, "warmup_evaluations": 4}, 6, "early_stopping"),
        ([0.9, 0.1], {"patience": 2, "warmup_evaluations": 1}, 4, "early_stopping"),
        ([0.5, 0.6, 0.2], {"divergence_threshold": 0.3}, 3, "diverged"),
        ([0.5, "nan"], {}, 2, "diverged"),
        ([0.5, "nan"], {"stop_on_non_finite": False, "patience": 2}, 3, "early_stopping"),
        ([0.5, "none", "none", 0.4], {"patience": 1}, 4, "early_stopping"),  # missing: not counted
        (["nan", 0.4, 0.3], {"patience": 2, "stop_on_non_finite": False}, 4, "early_stopping"),
        ([0.5, 0.4, 0.3], {"patience": 1, "mode": "min"}, 4, "early_stopping"),
        ([float(n) for n in range(12)], {"patience": 1}, 12, "finished"),
        ([0.5] * 11 + [0.4], {"patience": 11}, 12, "finished"),  # at the last step: simply done
    ],
)
def test_when_it_stops(
    tmp_path: Path, data: Path, scores: list[Any], settings: dict[str, Any], steps: int, reason: str
) -> None:
    result = train(tmp_path, scripted(data, scores, **settings))
    assert (result.steps, result.stop_reason) == (steps, reason)
    assert result.complete == (reason != "diverged")


def test_a_metric_that_is_not_measured_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        RunError, match=r"watches 'scroe', but the evaluation measured eval/loss.*eval/score"
    ):
        train(tmp_path, scripted(data, [0.5], metric="scroe"))


def test_it_needs_evaluations(tmp_path: Path, data: Path) -> None:
    content = scripted(data, [0.5])
    content["eval_interval"] = 0
    with pytest.raises(RecipeError, match="early_stopping waits for evaluations"):
        train(tmp_path, content)
    for key, value, text in (("warmup", "10 min", "a time"), ("min_delta", "-1%", "at least 0")):
        content = scripted(data, [0.5], **{key: value})
        with pytest.raises(RecipeError, match=text):
            train(tmp_path, content, name="other")


def test_the_best_is_saved_at_its_step(tmp_path: Path, data: Path) -> None:
    """Improvements at 2, 3 and 6; the best and the last stay, of both engines."""
    scores = [0.1, 0.2, 0.3, 0.3, "nan", 0.4, 0.2, 0.2]
    content = scripted(data, scores, steps=8, patience=20, stop_on_non_finite=False)
    keep = {"save_best": True, "keep_last": 1}
    content["checkpoint"] = [
        {"type": "deepspeed", "save_every_n_steps": 4, **keep}, {"type": "huggingface", **keep}
    ]  # fmt: skip
    result = train(tmp_path, content)
    run = tmp_path / "run"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best",
        "latest",
        "step-6",
        "step-8",
    ]
    assert (run / "checkpoints/best").read_text() == "step-6\n"
    assert sorted(p.name for p in (run / "exports").iterdir()) == ["best", "step-6"]
    assert result.exports == (run / "exports/step-6",)
    assert result.best["eval/score"] == 0.4
