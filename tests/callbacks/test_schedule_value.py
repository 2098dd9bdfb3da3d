"""Scheduled values: against closed forms at every step, and refused with what there is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arctic_like import load_recipe, run
from arctic_like.callbacks.schedule_value import ScheduleValueConfig
from arctic_like.errors import RecipeError
from tests.integration.tools import (
    MODEL,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

STEPS = 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "data.jsonl", count=20)


def train(folder: Path, data: Path, *schedules: dict[str, Any], overrides: tuple[str, ...] = (),
          resume: str = "", inspect: Any = None, **changes: Any) -> Path:  # fmt: skip
    made = recipe(
        data, type="distill", train_iters=STEPS, **changes,
        teacher={"model": {"config": MODEL, "dtype": "fp32"}, "frozen": True},
        callbacks=[{"type": "schedule_value", **one} for one in schedules],
        checkpoint=[{"type": "deepspeed"}],
    )  # fmt: skip
    made["model"]["config"] = {**MODEL, "attention_dropout": 0.2}
    path = write_recipe(folder / "recipe.yaml", made)
    run(load_recipe(path, list(overrides)), output_dir=folder / "run", resume=resume)
    return folder / "run"


SCHEDULES: list[dict[str, Any]] = [
    {"target": "distill_weight", "start": 1.0, "end": 0.0, "schedule": "cosine"},
    {"target": "temperature", "end": 8.0, "start": 1.0, "schedule": "exponential", "after": 2, "until": 6},
    {"target": "optimizer.weight_decay", "end": 0.3},
    {"target": "optimizer.betas.1", "schedule": "piecewise", "points": [[0.25, 0.9], [0.75, 0.99]]},
    {"target": "module.attention_dropout", "end": 0.0, "match": "layers"},
]  # fmt: skip


def test_values_follow_their_closed_forms_and_a_resume_goes_on(tmp_path: Path, data: Path) -> None:
    whole = train(tmp_path / "whole", data, *SCHEDULES)
    found = train_lines(whole)
    for step, line in enumerate(found):
        share = step / (STEPS - 1)
        middle = min(max((step - 2) / 4, 0), 1)
        assert {k.removeprefix("schedule/"): v for k, v in line.items() if "schedule/" in k} == (
            pytest.approx({
                "distill_weight": 0.5 * (1 + math.cos(math.pi * share)),
                "temperature": 8.0**middle,
                "optimizer.weight_decay": 0.1 + 0.2 * share,
                "optimizer.betas.1": 0.9 + 0.09 * min(max((share - 0.25) / 0.5, 0), 1),
                "module.attention_dropout": 0.2 * (1 - share),
            })
        )  # fmt: skip
    mixed = [(1 - w) * x["cross_entropy"] + w * t**2 * x["kl"] for x in found
             for w, t in [(x["schedule/distill_weight"], x["schedule/temperature"])]]  # fmt: skip
    assert [x["loss"] for x in found] == pytest.approx(mixed, rel=1e-5)
    train(tmp_path / "parts", data, *SCHEDULES, overrides=("exit_iteration=4",))
    parts = train(tmp_path / "parts", data, *SCHEDULES, resume="latest")
    assert without_clocks(parts) == without_clocks(whole)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (
            {"target": "epochs", "end": 2},
            "there are beta, distill_weight, hidden_weight, temperature, optimizer.",
        ),
        ({"target": "optimizer.lr", "end": 2}, "learning rates follow `scheduler`"),
        ({"target": "optimizer.momentum", "end": 2}, "optimizer.weight_decay"),
        ({"target": "module.p", "end": 0}, "module.attention_dropout"),
        ({"target": "distill_weight", "end": 2}, "less than or equal to 1"),
        ({"target": "temperature", "end": 2, "after": 8, "until": 4}, "before after"),
    ],
)
def test_what_cannot_be_scheduled_is_said(
    tmp_path: Path, data: Path, one: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        train(tmp_path, data, one)
    assert words in str(caught.value)
    assert "callbacks.schedule_value." in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "a"},
        {"target": "a", "schedule": "piecewise", "points": [[0, 1]]},
        {"target": "a", "schedule": "piecewise", "points": [[0.5, 1], [0.2, 1]]},
        {"target": "a", "schedule": "exponential", "start": 1, "end": 0},
        {"target": "a", "end": 1, "after": "10 min"},
    ],
)
def test_schedules_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ScheduleValueConfig(**wrong)
