"""Loss and gradient are the mean over the global batch's trained tokens, whatever the split.

Everything is compared with a bare torch loop that computes the definition directly: every document
alone, the sum of all trained tokens' losses divided by their number, clipping and AdamW by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest

from .tools import recipe, train_lines, write_conversations, write_recipe

STEPS = 10
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("exact") / "data.jsonl", count=150)


def train(folder: Path, content: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run a recipe here; its train lines, and its starting weights and global batches."""
    kept: dict[str, Any] = {}

    def inspect(trainer: Any) -> None:
        equipment = trainer.equipment
        kept["weights"] = {k: v.detach().clone() for k, v in trainer.module.state_dict().items()}
        kept["config"] = trainer.module.config
        position, batches = 0, []
        for _ in range(STEPS):
            batch = equipment.plan.at(position)
            position = batch.next_position
            batches.append([equipment.data.train[int(i)] for i in batch.samples])
        kept["batches"] = batches

    path = write_recipe(folder / "recipe.yaml", content)
    execute(
        load_recipe(path), output_dir=folder / "run", resume="", stop=StopRequest(), inspect=inspect
    )
    return train_lines(folder / "run"), kept


def documents(sample: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """A row's documents, each (tokens, labels): a new one begins wherever positions restart."""
    starts = [i for i, p in enumerate(sample["position_ids"]) if p == 0] + [len(sample["labels"])]
    for start, end in pairwise(starts):
        yield sample["input_ids"][start:end], sample["labels"][start:end]


def cosine(step: int, *, total: int, warmup: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def bare_loop(kept: dict[str, Any], *, rate: float, decay: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, by the definition."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(kept["config"]).float()
    model.load_state_dict(kept["weights"])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    out = []
    for step, batch in enumerate(kept["batches"]):
        optimizer.zero_grad()
        total, count = torch.zeros((), dtype=torch.float64), 0
        for sample in batch:
            for tokens, labels in documents(sample):
                logits = model(input_ids=torch.as_tensor(tokens)[None]).logits[0, :-1]
                targets = torch.as_tensor(labels)[1:].long()
                total = (
                    total
                    + torch.nn.functional.cross_entropy(
                        logits, targets, ignore_index=-100, reduction="sum"
                    ).double()
                )
                count += int((targets != -100).sum())
        loss = total / count
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, total=STEPS, warmup=1)
        optimizer.step()
        out.append((float(loss), norm))
    return out


@pytest.mark.parametrize("packed", [True, False])
def test_every_split_of_a_global_batch_equals_the_definition(
    tmp_path: Path, data: Path, packed: bool
) -> None:
    results = {}
    for micro, accumulation in ((8, 1), (1, 8), (2, 4)):
        content = recipe(
            data, train_iters=STEPS, micro_batch_size=micro, gradient_accumulation_steps=accumulation,
            data__pack_samples=packed, optimizer__learning_rate=3e-3,
        )  # fmt: skip
        results[micro] = train(tmp_path / f"{micro}", content)
    lines, kept = results[8]
    definition = bare_loop(kept, rate=3e-3, decay=0.1)
    counts = [sum(int((s["labels"][1:] != -100).sum()) for s in b) for b in kept["batches"]]
    assert max(counts) > 1.15 * min(counts)
    per_sample = [int((s["labels"][1:] != -100).sum()) for b in kept["batches"] for s in b]
    assert packed or max(per_sample) > 20 * min(per_sample), "label counts are meant to be uneven"
    assert len(lines) == STEPS
    for micro, (lines, _) in results.items():
        for line, (loss, norm), count in zip(lines, definition, counts, strict=True):
            assert line["loss"] == pytest.approx(loss, rel=1e-5), (micro, line["step"])
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-5), (micro, line["step"])
            assert line["tokens"] == count
    assert definition[-1][0] < definition[0][0]


def test_a_short_last_batch_is_trained_with_its_own_weight(tmp_path: Path, data: Path) -> None:
    """13 rows in global batches of 8: the epoch's second step has 5, neither dropped nor filled up."""
    seen: list[int] = []

    def inspect(trainer: Any) -> None:
        step = trainer.step

        def counting(micro_batches: Any) -> None:
            seen.append(sum(len(m.samples) for m in micro_batches if m.weight))
            step(micro_batches)

        trainer.step = counting

    short = write_conversations(tmp_path / "short.jsonl", count=13, seed=3)
    content = recipe(
        short, epochs=2, train_iters=0, micro_batch_size=2, gradient_accumulation_steps=4,
        data__pack_samples=False,
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    execute(
        load_recipe(path),
        output_dir=tmp_path / "run",
        resume="",
        stop=StopRequest(),
        inspect=inspect,
    )
    assert seen == [8, 5, 8, 5]
    found = train_lines(tmp_path / "run")
    assert [line["samples_seen"] for line in found] == [8, 13, 21, 26]
    assert found[-1]["epoch"] == 2.0
    tokens = [line["tokens"] for line in found]
    assert sum(tokens[:2]) == sum(tokens[2:]), "an epoch trains every label once"
    rates = [line["learning_rate"] for line in found]
    assert rates == pytest.approx([1e-2 * cosine(s, total=4, warmup=0) for s in range(4)])
