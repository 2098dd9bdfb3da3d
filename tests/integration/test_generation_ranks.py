"""exact_match on two real processes, at ZeRO 0 and 3: each prompt is asked once, by ranks in step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like.registry import lookup
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World

from .tools import MODEL, drive, recipe, write_conversations, write_recipe

pytestmark = pytest.mark.full

STAGES = (0, 3)
QUESTIONS = ["a", "what?", "ünï", "a much longer question " * 2, "b", "hm", "z" * 20, "who", "me"]
TOKENS = 8


def initial_model(config: dict[str, Any], seed: int) -> Any:
    factory = lookup("model", "huggingface")
    part = factory(factory.config_type(type="huggingface", **config))
    return part.build(
        tokenizer=byte_tokenizer(), seed=seed, world=World(), device="cpu", zero_stage=0,
        ds_config={},
    ).eval()  # fmt: skip


def said(model: Any, question: str) -> str:
    """Greedy, over the whole sequence each time."""
    ids = [259, *question.encode(), 257, 260]
    start = len(ids)
    for _ in range(TOKENS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == 257:
            break
    return bytes(i for i in ids[start:] if i < 256).decode(errors="replace").strip()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The evaluation line before the first step, by ZeRO stage."""
    folder = tmp_path_factory.mktemp("generation")
    data = write_conversations(folder / "data.jsonl", count=12)
    shape = {**copy.deepcopy(MODEL), "initializer_range": 0.4}
    callback = {"type": "exact_match", "source": str(folder / "held.jsonl"), "batch_size": 3,
                "max_new_tokens": TOKENS}  # fmt: skip
    content = recipe(data, model__config=shape, train_iters=1, eval_at_start=True,
                     callbacks=[callback])  # fmt: skip
    model = initial_model(content["model"], content["seed"])
    with (folder / "held.jsonl").open("w") as file:
        for number, question in enumerate(QUESTIONS):
            right = number % 3 != 1
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": said(model, question) if right else "no"},
            ]
            kind = "right" if right else "wrong"
            file.write(json.dumps({"messages": turns, "kind": kind}) + "\n")
    path = write_recipe(folder / "recipe.yaml", content)
    jobs = [
        {
            "recipe": str(path),
            "output_dir": str(folder / f"stage-{stage}"),
            "overrides": [f"deepspeed.zero_optimization.stage={stage}"],
        }
        for stage in STAGES
    ]
    drive(jobs, ranks=2, folder=folder)
    return {stage: _first_line(folder / f"stage-{stage}") for stage in STAGES}


def _first_line(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "metrics.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_count_what_one_model_says(lines, stage):
    line = lines[stage]
    assert line["step"] == 0
    assert line["eval/exact_match"] == pytest.approx(6 / 9)
    assert (line["eval/exact_match/right"], line["eval/exact_match/wrong"]) == (1.0, 0.0)
