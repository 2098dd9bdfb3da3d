"""Small models and a tokenizer for the tests."""

from __future__ import annotations

from typing import Any

from arctic_like.model.huggingface import HFModelConfig, HFModelFactory
from arctic_like.registry import lookup
from arctic_like.world import World

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", "intermediate_size": 48, **SIZES}
TIED = {**LLAMA, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXTRAL = {
    "model_type": "mixtral",
    "intermediate_size": 24,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    **SIZES,
}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def byte_tokenizer() -> Any:
    """The built-in byte tokenizer: 262 tokens."""
    factory = lookup("tokenizer", "byte")
    return factory(factory.config_type()).build(None)  # type: ignore[attr-defined]


def make(
    shape: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    zero_stage: int = 0,
    world: World | None = None,
    tokenizer: Any = None,
    **config: Any,
) -> Any:
    """A model built by the `huggingface` factory; fp32 unless `dtype` is given."""
    given = {"dtype": "fp32", **config} | ({"config": shape} if shape is not None else {})
    factory = HFModelFactory(HFModelConfig.model_validate(given))
    low = {"bf16": {"enabled": given["dtype"] == "bf16"}}
    return factory.build(
        tokenizer=tokenizer or byte_tokenizer(),
        seed=seed,
        world=world or World(),
        device="cpu",
        zero_stage=zero_stage,
        ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero_stage},
            **low,
        },
    )
