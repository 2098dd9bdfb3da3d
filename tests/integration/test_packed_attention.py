"""Packed and unpacked training give the same loss and gradient, whatever attention a model has.

The same documents, from files to batches by the real data factory and loader: one to a row, padded,
and packed. Each way the loss of one global batch is accumulated over its micro-batches as the
trainer does, and gradients are compared in fp32.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like.api import execute
from arctic_like.data.balance import Division
from arctic_like.data.factory import CausalDataConfig, CausalDataFactory
from arctic_like.data.loader import Loader
from arctic_like.errors import RecipeError
from arctic_like.model.attention import attention_of
from arctic_like.model.isolation import check_isolation, packed_inputs
from arctic_like.recipe import load_recipe
from arctic_like.stop import StopRequest
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.trainer.losses import mean_loss, token_losses, trained_labels
from arctic_like.world import World
from tests.integration.tools import (
    recipe,
    without_clocks,
    write_conversations,
    write_recipe,
)
from tests.model.shapes import make

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8},
    # every layer sees the last 6 tokens
    "mistral": {"model_type": "mistral", **SMALL, "sliding_window": 6},
    # layers that slide and layers that see all, each with its own mask
    "gemma3": {
        "model_type": "gemma3_text", **SMALL, "head_dim": 8, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {
        "model_type": "gemma2", **SMALL, "head_dim": 8, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen2": {
        "model_type": "qwen2", **SMALL, "use_sliding_window": True, "sliding_window": 6,
        "max_window_layers": 1,
    },
}  # fmt: skip
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 4 to 40 tokens, some much longer than the windows."""
    found: Path = tmp_path_factory.mktemp("documents")
    draw = random.Random(0)
    rows = [{"text": "".join(draw.choices("abcdefgh ", k=draw.randint(3, 39)))} for _ in range(24)]
    (found / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


def batches(folder: Path, *, pack: bool) -> list[dict[str, Any]]:
    """All documents as the micro-batches of one step."""
    config = CausalDataConfig.model_validate(
        {
            "sources": [str(folder / "texts.jsonl")], "max_length": 48, "pack_samples": pack,
            "cache_dir": folder / "cache",
        }
    )  # fmt: skip
    data = CausalDataFactory(config).build(
        tokenizer=byte_tokenizer(), output_dir=folder, seed=1, world=World()
    )
    assert data.train is not None
    assert data.plan is not None
    size = len(data.train)
    assert (size < 20) == pack, "packed rows hold several documents"
    loader = Loader(
        data.train, data.collate, data.plan(size), Division(4, max_tokens=128, balance=True)
    )
    return [micro.data for micro in next(loader.steps()).micro_batches]


def trained(model: Any, micro_batches: list[dict[str, Any]]) -> tuple[float, dict[str, Any], int]:
    """(loss, gradients by name, trained tokens) of a step."""
    model.zero_grad()
    weights = [trained_labels(batch["labels"]) for batch in micro_batches]
    loss = 0.0
    for batch, weight in zip(micro_batches, weights, strict=True):
        inputs = packed_inputs(model, batch["input_ids"], batch["position_ids"])
        logits = model(**inputs).logits
        mean = mean_loss(token_losses(logits, batch["labels"]), batch["labels"])
        scaled = mean * weight / sum(weights)
        scaled.backward()
        loss += float(scaled.detach())
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss, grads, sum(weights)


CASES = [(name, kind) for name in SHAPES for kind in ("sdpa", "eager", "varlen")]
CASES.remove(("gemma2", "sdpa"))  # transformers has none: its scores are capped
CASES.remove(("gemma2", "varlen"))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_is_unpacked(folder: Path, name: str, attention: str) -> None:
    model = make(
        SHAPES[name], attn_implementation=attention, disable_activation_checkpoint=True
    ).train()
    assert model.config._attn_implementation == attention
    check_isolation(model, vocab_size=262, device="cpu")
    packed, packed_grads, tokens = trained(model, batches(folder, pack=True))
    alone, alone_grads, same_tokens = trained(model, batches(folder, pack=False))
    assert tokens == same_tokens
    assert packed == pytest.approx(alone, rel=1e-5)
    assert packed_grads.keys() == alone_grads.keys()
    for key, grad in alone_grads.items():
        error = torch.linalg.vector_norm(packed_grads[key] - grad)
        assert error <= 1e-5 * torch.linalg.vector_norm(grad), key


def test_the_windows_are_windows(folder: Path) -> None:
    """Those models do slide: with a window of all positions they give another loss."""
    for name in ("mistral", "gemma3", "gemma2", "qwen2"):
        wide = make({**SHAPES[name], "sliding_window": 4096}, disable_activation_checkpoint=True)
        narrow = make(SHAPES[name], disable_activation_checkpoint=True)
        found = [trained(model, batches(folder, pack=False))[0] for model in (wide, narrow)]
        assert abs(found[0] - found[1]) > 1e-4, name


def test_a_leak_would_be_seen(folder: Path) -> None:
    """Positions that run on over the border, as if documents were one, fail the comparison."""
    model = make(SHAPES["llama"], disable_activation_checkpoint=True)
    rows = batches(folder, pack=True)
    right = trained(model, rows)[0]
    for batch in rows:
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(
            batch["input_ids"]
        )
    assert abs(trained(model, rows)[0] / right - 1) > 1e-4


def test_a_state_space_model_is_not_packed(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "train.jsonl", count=4)
    path = write_recipe(tmp_path / "mamba.yaml", recipe(data, model__config=MAMBA))
    with pytest.raises(RecipeError, match=r"data\.pack_samples.*state-space"):
        load_recipe(path)
    model = make(MAMBA, disable_activation_checkpoint=True)
    with pytest.raises(RecipeError, match=r"data\.pack_samples.*mamba"):
        check_isolation(model, vocab_size=262, device="cpu")
    assert load_recipe(path, ["data.pack_samples=false"]).config.data.pack_samples is False


def test_a_run_with_varlen_is_the_run_with_sdpa(tmp_path: Path) -> None:
    """With adapters, evaluation and checkpointed layers; on a CPU both compute under the same mask."""
    data = write_conversations(tmp_path / "train.jsonl", count=24)
    content = recipe(
        data, train_iters=3, micro_batch_size=2, eval_interval=3, data__train_eval_split=[0.8, 0.2],
        model__peft_config={"type": "lora", "r": 4, "target_modules": "all-linear"},
    )  # fmt: skip
    found = {}
    for attention in ("sdpa", "varlen", "auto"):
        path = write_recipe(tmp_path / f"{attention}.yaml", content)
        seen: list[str] = []
        execute(
            load_recipe(path, [f"model.attn_implementation={attention}"]),
            output_dir=tmp_path / attention, resume="", stop=StopRequest(),
            inspect=lambda trainer, seen=seen: seen.append(attention_of(trainer.module)),
        )  # fmt: skip
        assert seen == ["sdpa" if attention == "auto" else attention]
        found[attention] = without_clocks(tmp_path / attention)
    assert found["auto"] == found["sdpa"]
    assert len(found["varlen"]) == len(found["sdpa"]) > 3
    for mine, other in zip(found["varlen"], found["sdpa"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


def test_a_run_whose_kernel_computes_something_else_falls_back_or_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen is run against sdpa before the first step."""
    from arctic_like.model import attention, attention_choice

    monkeypatch.setattr(attention, "_usable", lambda query: True)
    monkeypatch.setattr(attention, "_found_kernel", lambda: wrong_kernel)
    choice = attention_choice.AttentionChoice("varlen", "as on CUDA")
    monkeypatch.setattr(attention_choice, "choose", lambda facts: choice)

    def wrong_kernel(
        query: Any,
        key: Any,
        value: Any,
        *_: Any,
        scale: float,
        window_size: Any,
        enable_gqa: bool = False,
    ) -> Any:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    data = write_conversations(tmp_path / "train.jsonl", count=8)
    path = write_recipe(tmp_path / "run.yaml", recipe(data, train_iters=1))
    seen: list[str] = []
    execute(
        load_recipe(path), output_dir=tmp_path / "auto", resume="", stop=StopRequest(),
        inspect=lambda trainer: seen.append(attention_of(trainer.module)),
    )  # fmt: skip
    assert seen == ["sdpa"]
    with pytest.raises(RecipeError, match=r"model\.attn_implementation.*off those of sdpa"):
        execute(
            load_recipe(path, ["model.attn_implementation=varlen"]),
            output_dir=tmp_path / "named", resume="", stop=StopRequest(),
        )  # fmt: skip
