"""By what a schedule moves: the recipe's words, and lengths in steps and epochs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from arctic_like.errors import RecipeError
from arctic_like.scheduler.base import Lengths, SchedulerConfig
from arctic_like.scheduler.closed_form import WSDConfig
from arctic_like.scheduler.dotted import DottedSchedulerConfig
from arctic_like.scheduler.huggingface import NEEDS_METRIC, HFSchedulerConfig
from arctic_like.scheduler.plateau import PlateauConfig


@pytest.mark.parametrize(
    ("kind", "stated", "place"),
    [
        (WSDConfig, {"interval": "metric"}, "interval"),
        (WSDConfig, {"interval": "month"}, "interval"),
        (WSDConfig, {"metric": "eval/loss"}, "metric"),
        (PlateauConfig, {"interval": "step"}, "interval"),
        (PlateauConfig, {"interval": "epoch"}, "interval"),
        (PlateauConfig, {"warmup_ratio": 0.1}, "warmup_ratio"),
        (PlateauConfig, {"warmup_steps": 3}, "warmup_steps"),
        (PlateauConfig, {"factor": 1.0}, "factor"),
        (PlateauConfig, {"mode": "lowest"}, "mode"),
        (HFSchedulerConfig, {"name": "cosine", "interval": "metric"}, "interval"),
        *[(HFSchedulerConfig, {"name": name}, "interval") for name in NEEDS_METRIC],
        (DottedSchedulerConfig, {"type": "StepLR"}, "type"),
    ],
)
def test_what_cannot_be(kind: Any, stated: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(stated)
    (error,) = caught.value.errors()
    assert place in (error["loc"] or (error["ctx"]["place"],))


def test_what_can() -> None:
    assert PlateauConfig().interval == "metric"
    assert HFSchedulerConfig(name="greedy", interval="metric").resolve_warmup(100) == 0
    stated = {"type": "torch.optim.lr_scheduler.ReduceLROnPlateau", "interval": "metric"}
    assert DottedSchedulerConfig.model_validate(stated).interval == "metric"


@pytest.mark.parametrize(
    ("stated", "expected", "in_steps"),
    [
        ({}, Lengths(total=95, warmup=9, steps_per_epoch=10, epochs=10), 9),
        ({"interval": "epoch"}, Lengths(total=10, warmup=1, steps_per_epoch=1, epochs=10), 10),
        ({"interval": "epoch", "warmup_steps": 3}, Lengths(10, 3, 1, 10), 30),
    ],
)
def test_lengths(stated: dict[str, Any], expected: Lengths, in_steps: int) -> None:
    config = WSDConfig.model_validate(stated)
    assert config.lengths(total_steps=95, steps_per_epoch=10) == expected
    assert config.warmup_in_steps(total_steps=95, steps_per_epoch=10) == in_steps


def test_data_without_epochs() -> None:
    assert SchedulerConfig().lengths(total_steps=20, steps_per_epoch=None).total == 20
    with pytest.raises(RecipeError, match="has no epochs"):
        WSDConfig(interval="epoch").lengths(total_steps=20, steps_per_epoch=None)


def test_a_warmup_in_epochs_that_leaves_none() -> None:
    with pytest.raises(RecipeError, match="the run has 2 epochs"):
        WSDConfig(interval="epoch", warmup_steps=2).lengths(total_steps=20, steps_per_epoch=10)
