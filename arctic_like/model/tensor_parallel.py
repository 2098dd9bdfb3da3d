"""Which weights of a transformers model are divided among the ranks that share its layers.

As in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): of attention and MLP the first linear layers are
divided by their outputs, so that a rank has some of the heads and of the hidden features, and the last
ones by their inputs; their partial results are summed. Everything else every rank has: embeddings, norms,
and the head, so that a loss finds all logits. DeepSpeed's AutoTP makes the layers; here stands what it is
told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.model.isolation import described

if TYPE_CHECKING:
    from torch import nn

    from arctic_like.model.base import ModelConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are known: projections of these names, none of them fused."""

BY_OUTPUT = (r".*\.self_attn\.[qkv]_proj\.weight$", r".*\.mlp\.(gate|up)_proj\.weight$")
BY_INPUT = (r".*\.self_attn\.o_proj\.weight$", r".*\.mlp\.down_proj\.weight$")
OF_HEADS = (r".*\.self_attn\.[qk]_norm\.weight$",)
"""Weights that every rank has and applies to its own heads: their gradients are summed."""


def division_refusal(config: ModelConfig, size: int, *, tokens: int = 1) -> tuple[str, str] | None:
    """Why `size` ranks cannot share the layers of a recipe's model, as (message, key of the model's config);
    None as far as the recipe, or a local folder's config.json, can tell.

    tokens: how many ranks share rows, and for their attention the heads of a rank once more."""
    for key, what in _NOT_WITH.items():
        if getattr(config, key, None):
            return what, key
    shape = described(config) | (getattr(config, "hf_config_kwargs", None) or {})
    reason = _reason(shape, size, tokens) if shape.get("model_type") else None
    return (reason, "") if reason else None


_NOT_WITH = {
    "peft_config": "is an adapter, whose matrices AutoTP does not divide",
    "adapter": "is an adapter, whose matrices AutoTP does not divide",
    "quantization": "stores weights in blocks, which cannot be divided",
    "compile": "compiles layers, which exchange parts of their results",
    "weights_from": "is written into whole weights",
}
"""Keys of a model's config that do not go with it, and why."""


def indivisible(module: nn.Module, size: int, *, tokens: int = 1) -> str | None:
    """As `division_refusal`, of a model that is there."""
    config: Any = getattr(module, "config", None)
    return _reason(config.to_dict() if hasattr(config, "to_dict") else {}, size, tokens)


def layer_specs(*, frozen: bool = False) -> dict[str, Any]:
    """What DeepSpeed's `tensor_parallel.partition_config` says of a model of a known architecture.

    frozen: nothing is trained, and no gradient summed.
    """
    specs: list[dict[str, Any]] = [
        {"patterns": list(BY_OUTPUT), "partition_type": "column"},
        {"patterns": list(BY_INPUT), "partition_type": "row"},
    ]
    if not frozen:
        heads = {"patterns": list(OF_HEADS), "partition_type": "skip", "grad_allreduce": True}
        specs.append(heads)
    return {"use_default_specs": False, "layer_specs": specs}


def _reason(shape: Mapping[str, Any], size: int, tokens: int) -> str | None:
    """Why a model of this shape cannot be divided."""
    kind = shape.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"is of type {kind}, whose layers are not known to be divisible ({known} are)"
    for key, what in _COUNTS.items():
        count = shape.get(key)
        if isinstance(count, int) and count % size:
            return f"has {count} {what}, which {size} ranks cannot share evenly"
    heads = shape.get("num_attention_heads")
    if isinstance(heads, int) and heads % (size * tokens):
        return (
            f"has {heads} attention heads, which {size} ranks that share layers × {tokens} that share rows "
            "cannot share evenly"
        )
    if shape.get("attention_dropout"):
        return "has attention_dropout, which each rank would draw for its own heads"
    return None


_COUNTS = {
    "num_attention_heads": "attention heads",
    "num_key_value_heads": "key heads",
    "intermediate_size": "features between the layers of an MLP",
}
