"""Two real ranks under DeepSpeed: tiled losses train as full logits do, also where the head is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import (
    MODEL,
    drive,
    lines,
    recipe,
    train_lines,
    write_conversations,
    write_recipe,
)

pytestmark = pytest.mark.full

TRAINERS = str(Path(__file__).with_name("tiled_trainers.py"))
SETTINGS: dict[str, dict[str, Any]] = {
    "stage 0": {"deepspeed__zero_optimization__stage": 0},
    "stage 2, tied": {"deepspeed__zero_optimization__stage": 2, "tied": True},
    "stage 3": {"deepspeed__zero_optimization__stage": 3},
    "stage 3, tied": {"deepspeed__zero_optimization__stage": 3, "tied": True},
    "stage 3, bf16": {"deepspeed__zero_optimization__stage": 3, "model__dtype": "bf16"},
}
KINDS = {
    setting: ("sft", "tiled_sft", "each_sft") if "3" in setting else ("sft", "tiled_sft")
    for setting in SETTINGS
}
RELATIVE = {"stage 3, bf16": 2e-2}


def place(folder: Path, setting: str, kind: str) -> Path:
    return folder / f"{setting}, {kind}".replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiled")
    data = write_conversations(folder / "data.jsonl", count=24)
    jobs = []
    for setting, options in SETTINGS.items():
        changes = {key: value for key, value in options.items() if key != "tied"}
        for kind in KINDS[setting]:
            content = recipe(
                data, type=kind, gradient_accumulation_steps=2, train_iters=3, eval_at_end=True,
                model__config={**MODEL, "tie_word_embeddings": options.get("tied", False)},
                data__eval_sources=[str(data)], **changes,
            )  # fmt: skip
            zero = content["deepspeed"]["zero_optimization"]
            if zero["stage"] == 3:  # every weight is divided, the head's too
                zero["stage3_param_persistence_threshold"] = 0
            if kind != "sft":
                content["code"] = TRAINERS
            run = place(folder, setting, kind)
            path = write_recipe(run.with_suffix(".yaml"), content)
            jobs.append({"recipe": str(path), "output_dir": str(run)})
    drive(jobs, ranks=2, folder=folder)
    return folder


@pytest.mark.parametrize(
    ("setting", "kind"), [(s, kind) for s in SETTINGS for kind in KINDS[s] if kind != "sft"]
)
def test_runs_are_those_of_full_logits(runs: Path, setting: str, kind: str) -> None:
    found, expected = (train_lines(place(runs, setting, k)) for k in (kind, "sft"))
    assert len(found) == len(expected) == 3
    near = RELATIVE.get(setting, 1e-4)
    for ours, plain in zip(found, expected, strict=True):
        assert ours["tokens"] == plain["tokens"]
        assert ours["loss"] == pytest.approx(plain["loss"], rel=near)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=near)
    (measured,), (true,) = (
        [line["eval/loss"] for line in lines(place(runs, setting, k)) if "eval/loss" in line]
        for k in (kind, "sft")
    )
    assert measured == pytest.approx(true, rel=near)
