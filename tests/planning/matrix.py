"""Recipes that are planned and trained: architectures, stages, dtypes, packing, adapters, heads, methods."""

from __future__ import annotations

from typing import Any

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
LLAMA = {**SIZES, "model_type": "llama"}
QWEN = {**SIZES, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}
QWEN2 = {**SIZES, "model_type": "qwen2"}
GEMMA = {**SIZES, "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 128}
LORA = {"type": "lora", "r": 8, "target_modules": "all-linear"}
WIDE = {**LLAMA, "vocab_size": 8000}
"""A vocabulary so large that logits dominate where they are whole."""

BASE: dict[str, Any] = {
    "model__config": LLAMA, "data__pack_samples": True, "data__max_length": 256,
    "micro_batch_size": 2, "train_iters": 3,
}  # fmt: skip
PADDED = {"data__pack_samples": False, "micro_batch_size": 8}
BF16 = {"model__dtype": "bf16"}
CHECKPOINTED = {"model__disable_activation_checkpoint": False}
BF16_STATES = {
    **BF16, "optimizer": {"type": "adamw_bf16", "learning_rate": 0.001},
    "deepspeed__bf16": {
        "enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True
    },
}  # fmt: skip
LAYERS = {"deepspeed__tensor_parallel": {"autotp_size": 2}}
ROWS_TOO = {**LAYERS, "sequence_parallel_size": 2}
SAVED_MEANWHILE = {"type": "deepspeed", "asynchronous": True, "save_every_n_steps": 1}


def stage(number: int) -> dict[str, Any]:
    """With small buckets, which do not outweigh a small model."""
    return {"deepspeed__zero_optimization": {"stage": number, "reduce_bucket_size": 2**17}}


ONE_RANK: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bf16-stage-2": {**BF16, **stage(2)},
    "llama-padded": PADDED,
    "llama-bf16-stage-0": {**BF16, **stage(0)},
    "llama-bf16-stage-1": {**BF16, **stage(1)},
    "llama-bf16-stage-3": {**BF16, **stage(3)},
    "llama-stage-1": stage(1),
    "llama-stage-2": stage(2),
    "llama-stage-3": stage(3),
    "llama-checkpointed": CHECKPOINTED,
    "llama-checkpointed-bf16-stage-2": {**CHECKPOINTED, **BF16, **stage(2)},
    "llama-accumulated": {"gradient_accumulation_steps": 2, "micro_batch_size": 1},
    "llama-accumulated-bf16-stage-2": {
        "gradient_accumulation_steps": 2, "micro_batch_size": 1, **BF16, **stage(2)
    },
    "llama-lora": {"model__peft_config": LORA},
    "llama-lora-bf16-stage-2": {"model__peft_config": LORA, **BF16, **stage(2)},
    "llama-lora-checkpointed": {"model__peft_config": LORA, **CHECKPOINTED},
    "llama-eager": {"model__attn_implementation": "eager"},
    "llama-wide": {"model__config": WIDE},
    "llama-wide-bf16-stage-2": {"model__config": WIDE, **BF16, **stage(2)},
    "llama-wide-padded-lora": {"model__config": WIDE, "model__peft_config": LORA, **PADDED},
    "llama-causal": {"type": "causal", "data__type": "sft"},
    "llama-sgd": {"optimizer": {"type": "sgd", "learning_rate": 0.01}},
    "llama-lion": {"optimizer": {"type": "lion", "learning_rate": 0.001}},
    "llama-budget": {"data__pack_samples": False, "data__max_tokens_per_batch": 512},
    "qwen3": {"model__config": QWEN},
    "qwen3-bf16-stage-2": {"model__config": QWEN, **BF16, **stage(2)},
    "qwen3-padded-stage-3": {"model__config": QWEN, **PADDED, **stage(3)},
    "gemma3": {"model__config": GEMMA},
    "gemma3-bf16-checkpointed": {"model__config": GEMMA, **BF16, **stage(1), **CHECKPOINTED},
    "gpt2": {"model__config": GPT2},
    "gpt2-padded-bf16-stage-2": {"model__config": GPT2, **PADDED, **BF16, **stage(2)},
    "gpt2-lora": {"model__config": GPT2, "model__peft_config": {**LORA, "target_modules": ["c_attn"]}},
    "mixtral": {"model__config": MIXTRAL},
    "mixtral-bf16-stage-2": {"model__config": MIXTRAL, **BF16, **stage(2)},
    "llama-selective": {**CHECKPOINTED, "model__activation_checkpointing": "selective"},
    "llama-every-second-bf16-stage-2": {
        **CHECKPOINTED, "model__activation_checkpointing": 2, **BF16, **stage(2)
    },
    "llama-tiled": {"tiled_mlp_compute": True, **CHECKPOINTED},
    "llama-tiled-bf16-stage-3": {"tiled_mlp_compute": True, **CHECKPOINTED, **BF16, **stage(3)},
    "llama-adamw-bf16-stage-2": {**BF16_STATES, **stage(2)},
    "llama-adamw-bf16-stage-3": {**BF16_STATES, **stage(3)},
    "llama-saved-meanwhile": {"checkpoint": [SAVED_MEANWHILE]},
    "llama-saved-meanwhile-bf16-stage-2": {"checkpoint": [SAVED_MEANWHILE], **BF16, **stage(2)},
}  # fmt: skip
TWO_RANKS: dict[str, dict[str, Any]] = {
    "two-llama": {},
    "two-llama-bf16-stage-1": {**BF16, **stage(1)},
    "two-llama-bf16-stage-2": {**BF16, **stage(2)},
    "two-llama-bf16-stage-3": {**BF16, **stage(3)},
    "two-llama-checkpointed-stage-3": {**CHECKPOINTED, **stage(3)},
    "two-qwen3-lora-bf16-stage-2": {
        "model__config": QWEN, "model__peft_config": LORA, **BF16, **stage(2)
    },
    "two-llama-sharing-rows": {"sequence_parallel_size": 2},
    "two-qwen3-sharing-rows-checkpointed-bf16-stage-3": {
        "sequence_parallel_size": 2, "model__config": QWEN, **CHECKPOINTED, **BF16, **stage(3)
    },
    "two-gpt2-padded-stage-2": {"model__config": GPT2, **PADDED, **stage(2)},
}  # fmt: skip
SHARED_LAYERS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "two-llama-sharing-layers": LAYERS,
        "two-llama-sharing-layers-stage-1": {**LAYERS, **stage(1)},
        "two-llama-sharing-layers-stage-2": {**LAYERS, **stage(2)},
        "two-llama-sharing-layers-stage-3": {**LAYERS, **stage(3)},
        "two-llama-sharing-layers-bf16-stage-2": {**LAYERS, **BF16, **stage(2)},
        "two-llama-sharing-layers-checkpointed-bf16-stage-2": {
            **LAYERS, **CHECKPOINTED, **BF16, **stage(2)
        },
        "two-llama-sharing-layers-checkpointed-bf16-stage-3": {
            **LAYERS, **CHECKPOINTED, **BF16, **stage(3)
        },
        "two-llama-sharing-layers-padded-accumulated-stage-2": {
            **LAYERS, **PADDED, "micro_batch_size": 4, "gradient_accumulation_steps": 2, **stage(2)
        },
        "two-qwen3-sharing-layers-bf16-stage-3": {**LAYERS, "model__config": QWEN, **BF16, **stage(3)},
        "two-qwen2-sharing-layers-checkpointed": {**LAYERS, "model__config": QWEN2, **CHECKPOINTED},
    },
    4: {
        "four-llama-sharing-rows-and-layers-bf16-stage-2": {**ROWS_TOO, **BF16, **stage(2)},
        "four-llama-sharing-rows-and-layers-checkpointed-stage-3": {
            **ROWS_TOO, **CHECKPOINTED, **stage(3)
        },
        "four-llama-in-two-groups-bf16-stage-2": {**LAYERS, **BF16, **stage(2)},
    },
}  # fmt: skip
"""By the number of ranks."""
DEFAULT = ("llama", "llama-bf16-stage-2", "llama-padded", "llama-lora-checkpointed", "qwen3",
           "mixtral")  # fmt: skip
