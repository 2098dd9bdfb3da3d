"""Every schedule at every step, against its closed form."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.trainer_utils import SchedulerType

from arctic_like.errors import RecipeError
from arctic_like.scheduler.closed_form import (
    CosineWithFloorConfig,
    CosineWithFloorFactory,
    WSDConfig,
    WSDFactory,
    cosine_with_floor,
    wsd,
)
from arctic_like.scheduler.huggingface import (
    NEEDS_METRIC,
    HFSchedulerConfig,
    HFSchedulerFactory,
    ScheduleName,
)

RATE, TOTAL, WARMUP = 0.5, 20, 4


def rates(factory: Any, *, total: int = TOTAL, warmup: int = WARMUP) -> list[float]:
    """The rate that each step trains with, as a training loop sees it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = factory.build(optimizer=optimizer, total_steps=total, warmup_steps=warmup)
    result = []
    for _ in range(total):
        result.append(optimizer.param_groups[0]["lr"] / RATE)
        optimizer.step()
        scheduler.step()
    return result


def rising(step: int) -> float:
    return step / WARMUP


def progress(step: int) -> float:
    return (step - WARMUP) / (TOTAL - WARMUP)


TRANSFORMERS: dict[str, tuple[dict[str, Any], Any]] = {
    "linear": ({}, lambda s: 1 - progress(s)),
    "cosine": ({}, lambda s: (1 + math.cos(math.pi * progress(s))) / 2),
    "cosine_with_restarts": (
        {"num_cycles": 2},
        lambda s: (1 + math.cos(math.pi * (2 * progress(s) % 1))) / 2,
    ),
    "polynomial": (
        {"power": 2.0, "lr_end": 0.05},
        lambda s: 0.9 * (1 - progress(s)) ** 2 + 0.1,
    ),
    "constant_with_warmup": ({}, lambda s: 1.0),
    "inverse_sqrt": ({}, lambda s: math.sqrt(WARMUP / s)),
    "cosine_with_min_lr": (
        {"min_lr_rate": 0.1},
        lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * progress(s))) / 2,
    ),
    "warmup_stable_decay": (
        {"num_decay_steps": 5, "decay_type": "linear"},
        lambda s: 1.0 if s < TOTAL - 5 else (TOTAL - s) / 5,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_schedules(name: str) -> None:
    kwargs, after = TRANSFORMERS[name]
    config = HFSchedulerConfig(name=name, scheduler_specific_kwargs=kwargs)  # type: ignore[arg-type]
    expected = [rising(s) if s < WARMUP else after(s) for s in range(TOTAL)]
    assert rates(HFSchedulerFactory(config)) == pytest.approx(expected, abs=1e-12)


def test_cosine_warmup_with_min_lr_starts_above_zero() -> None:
    config = HFSchedulerConfig(
        name="cosine_warmup_with_min_lr", scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    found = rates(HFSchedulerFactory(config))
    assert found[:WARMUP] == pytest.approx([(s + 1) / WARMUP for s in range(WARMUP)])
    assert found[-1] == pytest.approx(0.1)


def test_constant() -> None:
    config = HFSchedulerConfig(name="constant")
    assert config.resolve_warmup(100) == 0
    assert rates(HFSchedulerFactory(config), warmup=0) == [1.0] * TOTAL


def test_all_names_of_transformers_are_declared() -> None:
    assert set(get_args(ScheduleName)) == {kind.value for kind in SchedulerType}
    tested = {*TRANSFORMERS, "constant", "cosine_warmup_with_min_lr", *NEEDS_METRIC}
    assert tested == set(get_args(ScheduleName))


@pytest.mark.parametrize("name", NEEDS_METRIC)
def test_schedules_that_follow_a_metric_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="follows a metric"):
        HFSchedulerConfig(name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kwargs", "sentence"),
    [
        ("cosine", {"cycles": 2}, "num_cycles"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("polynomial", {"lr_end": 2.0}, "lr_end"),
        ("cosine_with_min_lr", {}, "min_lr"),
    ],
)
def test_settings_that_do_not_fit(name: str, kwargs: dict[str, Any], sentence: str) -> None:
    config = HFSchedulerConfig(name=name, scheduler_specific_kwargs=kwargs)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="scheduler_specific_kwargs") as caught:
        rates(HFSchedulerFactory(config))
    assert sentence in str(caught.value)


FALLING = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: math.cos(math.pi * p / 2) ** 2,
    "sqrt": lambda p: 1 - p**0.5,
}


@pytest.mark.parametrize("shape", FALLING)
def test_wsd(shape: Any) -> None:
    config = WSDConfig(decay_steps=5, decay_shape=shape, min_lr_ratio=0.2)
    expected = [
        (s + 1) / 5 if s < 4 else 1.0 if s < 15 else 0.2 + 0.8 * FALLING[shape]((s - 14) / 6)
        for s in range(TOTAL)
    ]
    assert rates(WSDFactory(config)) == pytest.approx(expected, abs=1e-12)


def test_cosine_with_floor() -> None:
    config = CosineWithFloorConfig(min_lr_ratio=0.1)
    expected = [
        (s + 1) / 5 if s < 4 else 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 4) / 15)) / 2
        for s in range(TOTAL)
    ]
    found = rates(CosineWithFloorFactory(config))
    assert found == pytest.approx(expected, abs=1e-12)
    assert found[WARMUP] == 1.0
    assert found[-1] == pytest.approx(0.1, abs=1e-15)


@given(
    total=st.integers(1, 60),
    data=st.data(),
    floor=st.floats(0, 1),
    shape=st.sampled_from(["linear", "cosine", "sqrt"]),
)
def test_own_schedules_train_at_every_step_and_peak_once(
    total: int, data: Any, floor: float, shape: Any
) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    decay = data.draw(st.integers(0, total - warmup - 1))
    for found in (
        [wsd(s, total=total, warmup=warmup, decay=decay, shape=shape, floor=floor)
         for s in range(total)],
        [cosine_with_floor(s, total=total, warmup=warmup, floor=max(floor, 0.01))
         for s in range(total)],
    ):  # fmt: skip
        assert all(0 < rate <= 1 for rate in found)
        assert found[warmup] == 1.0
        assert found[: warmup + 1] == sorted(found[: warmup + 1])
        assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("given_", "total", "steps"),
    [
        ({}, 100, 10),
        ({"warmup_ratio": 0.29}, 100, 29),
        ({"warmup_ratio": "5%"}, 99, 4),
        ({"warmup_ratio": 0}, 5, 0),
        ({"warmup_ratio": 0.1}, 5, 0),
        ({"warmup_steps": "1k"}, 2000, 1000),
        ({"warmup_steps": 0}, 1, 0),
    ],
)
def test_warmup(given_: dict[str, Any], total: int, steps: int) -> None:
    assert WSDConfig.model_validate(given_).resolve_warmup(total) == steps


@pytest.mark.parametrize("given_", [{"warmup_ratio": 1.0}, {"warmup_steps": 10}])
def test_warmup_that_leaves_no_step(given_: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="the run has 10 steps"):
        WSDConfig.model_validate(given_).resolve_warmup(10)


@pytest.mark.parametrize(
    ("kind", "given_"),
    [
        (WSDConfig, {"warmup_ratio": 0.1, "warmup_steps": 5}),
        (WSDConfig, {"decay_ratio": 0.1, "decay_steps": 5}),
        (WSDConfig, {"decay_shape": "step"}),
        (HFSchedulerConfig, {"name": "constant", "warmup_steps": 5}),
        (HFSchedulerConfig, {"name": "cosin"}),
    ],
)
def test_contradictions(kind: Any, given_: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(given_)


def test_warmup_and_decay_must_fit_the_run() -> None:
    with pytest.raises(RecipeError, match="longer together"):
        rates(WSDFactory(WSDConfig(decay_steps=18)))
