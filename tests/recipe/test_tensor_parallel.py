"""What `deepspeed.tensor_parallel.autotp_size` cannot be combined with is refused by name at validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.engine.ds_section import TENSOR_PARALLEL, tensor_parallel_size
from arctic_like.registry import lookup

from .refusals import refusal

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LORA = {"type": "lora", "r": 4}


def section(stage: int = 2, size: Any = 2, **zero: Any) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, **zero},
        "tensor_parallel": {"autotp_size": size},
    }


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A recipe whose layers two ranks share."""
    (tmp_path / "rows.jsonl").write_text("")
    return {
        "model": {"config": LLAMA, "dtype": "fp32"}, "tokenizer": {"type": "byte"},
        "deepspeed": section(), "data": {"sources": [str(tmp_path / "rows.jsonl")]},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "reward", "data": {"type": "dpo", "sources": ["x.jsonl"]}}, ["'reward'"]),
        ({"model": {"config": {**LLAMA, "num_attention_heads": 5}}}, ["model", "5 attention heads"]),
        ({"model": {"config": {**LLAMA, "num_key_value_heads": 1}}}, ["model", "1 key heads"]),
        ({"model": {"config": {**LLAMA, "intermediate_size": 65}}}, ["65 features"]),
        ({"model": {"config": {**LLAMA, "attention_dropout": 0.1}}}, ["attention_dropout"]),
        ({"model": {"config": LLAMA, "hf_config_kwargs": {"attention_dropout": 0.1}}},
         ["attention_dropout"]),
        ({"model": {"config": {"model_type": "mixtral"}}}, ["mixtral", "llama, mistral"]),
        ({"model": {"config": LLAMA, "peft_config": LORA}}, ["model.peft_config", "adapter"]),
        ({"model": {"config": LLAMA, "compile": True, "dtype": "fp32"}}, ["model.compile"]),
        ({"model": {"config": LLAMA, "weights_from": {"path": "x.safetensors"}}}, ["model.weights_from"]),
        ({"model": {"config": LLAMA, "type": "liger"}}, ["model.type", "'liger'"]),
        ({"model": {"config": LLAMA, "dtype": "bf16"}, "deepspeed": section(0)},
         ["deepspeed.zero_optimization.stage", "bf16", "stage 2 or 3"]),
        ({"model": {"config": LLAMA, "dtype": "bf16"}, "deepspeed": section(1)},
         ["deepspeed.zero_optimization.stage", "is 1 in bf16", "too large"]),
        ({"deepspeed": section(3, offload_optimizer={"device": "cpu"})},
         ["deepspeed.zero_optimization.offload_optimizer"]),
        ({"deepspeed": section(3, zero_hpz_partition_size=2)}, ["zero_hpz_partition_size"]),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}},
         ["deepspeed.tensor_parallel.preset_model"]),
        ({"tiled_mlp_compute": True}, ["tiled_mlp_compute"]),
        ({"exporters": [{"type": "safetensors"}]}, ["exporters.0", "huggingface"]),
        ({"sequence_parallel_size": 4},
         ["4 attention heads", "2 ranks that share layers × 4 that share rows"]),
        ({"callbacks": [{"type": "early_stopping"}, {"type": "ema"}]}, ["callbacks.1"]),
        ({"type": "dpo", "data": {"type": "dpo", "sources": ["x.jsonl"]}, "deepspeed": section(3),
          "ref_model": {"config": {**LLAMA, "num_attention_heads": 1}}},
         ["ref_model", "1 attention heads"]),
        ({"type": "dpo", "data": {"type": "dpo", "sources": ["x.jsonl"]},
          "reference_model_deepspeed": {"zero_optimization": {"stage": 3}}},
         ["reference_model_deepspeed"]),
        ({"type": "dpo", "data": {"type": "dpo", "sources": ["x.jsonl"]},
          "reference": {"deepspeed": {"zero_optimization": {"stage": 3}}}},
         ["reference", "settings of its own"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_it_is_refused(base: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    text = refusal({**base, **changes})
    assert "tensor_parallel" in text
    for word in words:
        assert word in text


def test_the_same_recipes_are_valid_without_it(base: dict[str, Any]) -> None:
    assert tensor_parallel_size(load_recipe(base).config.deepspeed) == 2
    odd = {**base, "model": {"config": {**LLAMA, "num_key_value_heads": 1}}}
    for size in (0, 1):
        load_recipe({**odd, "deepspeed": section(size=size)})
    load_recipe({**base, "sequence_parallel_size": 2})
    whole = {**base, "type": "dpo", "data": {"type": "dpo", "sources": ["x.jsonl"]}}
    small = {"config": {**LLAMA, "num_attention_heads": 1}}
    load_recipe({**whole, "ref_model": small})  # at stage 2 it is whole on every rank


@pytest.mark.parametrize(
    ("name", "divides"),
    [*((name, True) for name in ("sft", "causal", "dpo", "orpo", "simpo", "cpo", "kto")),
     *((name, False) for name in ("reward", "process_reward", "distill", "embedding", "gan",
                                  "classification", "supervised"))],
)  # fmt: skip
def test_whose_layers_are_shared(name: str, divides: bool) -> None:
    assert lookup("trainer", name).divides_models is divides  # type: ignore[attr-defined]


def test_how_many_ranks_share_layers() -> None:
    assert TENSOR_PARALLEL == "deepspeed.tensor_parallel.autotp_size"
    stated: list[tuple[Any, int]] = [
        (None, 1), ({}, 1), ({"tensor_parallel": None}, 1),
        *(({"tensor_parallel": {"autotp_size": given}}, size)
          for given, size in ((0, 1), (1, 1), (4, 4), ("4", 4), ("auto", 1))),
    ]  # fmt: skip
    for given, size in stated:
        assert tensor_parallel_size(given) == size
