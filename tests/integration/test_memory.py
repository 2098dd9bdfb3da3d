"""Ways to save memory change no loss and no gradient norm, at any ZeRO stage and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import refuse_what_cannot_run
from arctic_like.errors import RecipeError

from .tools import drive, recipe, train_lines, write_conversations, write_recipe

WAYS: dict[str, dict[str, Any]] = {
    "tiled": {"tiled_mlp_compute": True},
    "tiled-again": {"tiled_mlp_compute": True, "model__disable_activation_checkpoint": False},
    "selective": {"model__disable_activation_checkpoint": False,
                  "model__activation_checkpointing": "selective"},
    "every-second": {"model__disable_activation_checkpoint": False,
                     "model__activation_checkpointing": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "stage", "ways"),
    [
        pytest.param(2, 3, ("tiled", "tiled-again", "every-second"), marks=pytest.mark.full),
        pytest.param(2, 2, tuple(WAYS), marks=pytest.mark.full),
        pytest.param(1, 0, tuple(WAYS), marks=pytest.mark.full),
        pytest.param(1, 3, ("tiled-again", "every-second"), marks=pytest.mark.full),
    ],
)
def test_losses_and_gradient_norms_are_those_of_keeping_everything(
    tmp_path: Path, ranks: int, stage: int, ways: tuple[str, ...]
) -> None:
    """Rows of 128 tokens through MLPs in pieces of 32; packed, with accumulation."""
    data = write_conversations(tmp_path / "data.jsonl")
    jobs = []
    for name in ("plain", *ways):
        made = recipe(
            data, train_iters=5, gradient_accumulation_steps=2,
            deepspeed__zero_optimization__stage=stage, **WAYS.get(name, {}),
        )  # fmt: skip
        path = write_recipe(tmp_path / f"{name}.yaml", made)
        jobs.append({"recipe": str(path), "output_dir": str(tmp_path / name)})
    drive(jobs, ranks=ranks, folder=tmp_path)
    expected = train_lines(tmp_path / "plain")
    for name in ways:
        found = train_lines(tmp_path / name)
        for one, other in zip(found, expected, strict=True):
            for key in ("loss", "grad_norm"):
                assert one[key] == pytest.approx(other[key], rel=1e-5), (name, one["step"], key)


def test_what_zero_3_cannot_follow_is_refused_before_the_run(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl")
    made = recipe(data, deepspeed__zero_optimization__stage=3, **WAYS["selective"])
    with pytest.raises(RecipeError, match=r"(?s)model.activation_checkpointing.*selective.*ZeRO 2"):
        refuse_what_cannot_run(
            load_recipe(write_recipe(tmp_path / "r.yaml", made), []), on_cpu=True
        )
