"""The overfitting warning: when it begins, once, and what is logged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loguru import logger

from arctic_like.callbacks.overfitting import GAP, OverfittingConfig, OverfittingWarning
from arctic_like.config.interval import Interval
from arctic_like.trainer.config import MetricMonitor
from arctic_like.world import World
from tests.callbacks import runs
from tests.integration.tools import lines, recipe, write_conversations


def trainer() -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(metric_monitor=MetricMonitor(), eval_interval=Interval.of(2)),
        world=World(), global_step=0,
        session=SimpleNamespace(host=SimpleNamespace(from_main=lambda value: value)),
    )  # fmt: skip


def warnings_of(
    course: list[tuple[float, float]],
    *,
    cut: int | None = None,
    metric: str = "eval/loss",
    **config: Any,
) -> tuple[list[int], list[float | None]]:
    """(evaluations that warned, logged gaps) for pairs (train loss, metric), a line at every second step.

    cut: save after this evaluation and go on with a new callback.
    """
    told: list[str] = []
    sink = logger.add(lambda message: told.append(str(message)), level="WARNING")
    one = trainer()
    callback = OverfittingWarning(OverfittingConfig(metric=metric, **config))
    callback.on_setup_end(one)
    warned, gaps = [], []
    try:
        for number, (train, value) in enumerate(course):
            for part in (train - 0.5, train + 0.5):  # the mean counts
                one.global_step += 2
                callback.on_log(one, {"loss": part})
            results = {metric: value}
            before = len(told)
            callback.on_evaluate_end(one, results)
            warned += [number] if len(told) > before else []
            gaps.append(results.get(GAP))
            if number == cut:
                state = callback.state_dict()
                callback = OverfittingWarning(OverfittingConfig(metric=metric, **config))
                callback.on_setup_end(one)
                callback.load_state_dict(state)
    finally:
        logger.remove(sink)
    assert all("overfits" in text for text in told)
    return warned, gaps


FALLING = [3.0, 2.5, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
VALLEY = [3.1, 2.6, 2.7, 2.8, 2.9, 3.0, 2.4, 2.5, 2.6, 2.7]


@pytest.mark.parametrize("cut", [None, 3, 5])
def test_it_warns_once_each_time_it_begins(cut: int | None) -> None:
    warned, gaps = warnings_of(list(zip(FALLING, VALLEY, strict=True)), patience=3, cut=cut)
    assert warned == [4, 9]
    assert gaps == pytest.approx([v - t for t, v in zip(FALLING, VALLEY, strict=True)])


def test_what_is_none() -> None:
    """The train loss rises too; the gap is small; the difference is noise; accuracies have no gap."""
    rising = [3.0, 2.5, 2.6, 2.7, 2.8, 2.9]
    assert warnings_of(list(zip(rising, VALLEY, strict=False)), patience=2)[0] == []
    course = list(zip(FALLING, VALLEY, strict=True))
    assert warnings_of(course, patience=3, gap=1.95)[0] == [5, 9]  # 2.9 - 1.0 is less
    assert warnings_of(course, patience=1, min_delta="20%")[0] == []
    assert warnings_of(course, patience=1, min_delta=0.25)[0] == [4]  # 2.4 is no new best
    accuracies = [(t, -v) for t, v in course]
    warned, gaps = warnings_of(accuracies, metric="eval/accuracy", patience=3)
    assert warned == [4, 9]
    assert gaps == [None] * 10


def test_in_a_run_the_gap_is_in_the_evaluation_lines(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=24)
    content = recipe(
        data, train_iters=6, eval_interval=2, data__train_eval_split=[0.9, 0.1],
        callbacks=[{"type": "overfitting_warning"}],
    )  # fmt: skip
    runs.train(tmp_path, content)
    written = lines(tmp_path / "run")
    losses = [line["loss"] for line in written if "loss" in line]
    found = [line for line in written if GAP in line]
    assert [line["step"] for line in found] == [2, 4, 6]
    assert found[1][GAP] == pytest.approx(found[1]["eval/loss"] - (losses[2] + losses[3]) / 2)
