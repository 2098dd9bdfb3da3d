"""Whether a model keeps the documents of a packed row apart: by name, and by proof.

Packed documents are told apart by position ids that restart. Attention honours that; a state, a
convolution, a linear attention or a mask of the model's own carries on over the border. By name,
`cannot_isolate` refuses such a model from the recipe alone; `check_isolation` runs the model that
will be trained, because attention implementations differ too.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.model.adapters.config import PROMPTS, kind_of
from arctic_like.model.attention import VARLEN, as_mask, attention_of, base_of
from arctic_like.model.randomness import untouched_randomness
from arctic_like.sequence.rows import borders_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.model.base import ModelConfig

_STATE = "its state-space layers carry their state over the border"
_LINEAR = "its linear attention carries its state over the border"
_RECURRENT = "its recurrent layers carry their state over the border"
_CONVOLUTION = "its convolutions reach over the border"
_OWN_MASK = "its attention mask does not follow the position ids that tell documents apart"

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_REASONS: dict[str, str] = {
    **dict.fromkeys(
        ("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2",
         "nemotron_h", "zamba", "zamba2"),
        _STATE,
    ),
    **dict.fromkeys(
        ("bailing_hybrid", "kimi_linear", "minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
         "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text"),
        _LINEAR,
    ),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm"), _RECURRENT),
    **dict.fromkeys(
        ("inkling", "inkling_text", "inkling2", "inkling2_text", "lfm2", "lfm2_moe", "lfm3",
         "zaya"),
        _CONVOLUTION,
    ),
    **dict.fromkeys(
        ("afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "mpt", "openai-gpt", "opt", "xglm",
         "bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
         "trocr", "cpmant", "xlnet"),
        _OWN_MASK,
    ),
}  # fmt: skip
"""Measured with transformers 5.23 on small random models; newer ones may mend some of the last."""


def described(config: ModelConfig) -> dict[str, Any]:
    """What can be read of a model's shape from the recipe, or from a local folder's config.json.

    Empty for a Hub name. Reads one small file; imports nothing heavy.
    """
    shape = getattr(config, "config", None)
    if shape is not None:
        return dict(shape)
    name = getattr(config, "name_or_path", "")
    if not name:
        return {}
    try:
        content = json.loads((Path(name) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def cannot_isolate(model_type: str, shape: Mapping[str, Any] | None = None) -> str | None:
    """Why packed documents would see each other in this architecture; None if not known.

    shape: the rest of the model's config. A hybrid whose layers are all attention is not refused.
    """
    reason = _REASONS.get(model_type)
    kinds = (shape or {}).get("layer_types") or (shape or {}).get("layers_block_type")
    if reason and isinstance(kinds, list) and kinds:
        only_attention = all(str(kind).endswith("attention") for kind in kinds)
        linear = any("linear" in str(kind) for kind in kinds)
        if only_attention and not linear and reason != _OWN_MASK:
            return None
    return reason


def packed_inputs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, *, borders: Tensor | None = None
) -> dict[str, Any]:
    """What a transformers model is called with so that position ids alone tell documents apart.

    input_ids, position_ids: (rows, length) int64. No attention mask and no cache, which would undo
    it. `varlen` attention is told where documents begin: `borders` (`sequence.borders_of`), found here, by
    waiting for the device, unless given; others have no use for them. Flash attention finds borders within
    a single row only, so for it the rows are laid end to end: its logits are (1, rows · length,
    vocabulary) and want a `view`. Behind virtual tokens (prompt and prefix tuning) a row is one document,
    whose positions the model counts itself.
    """
    from arctic_like.model.adapters.build import is_prompt

    if is_prompt(model):
        return {"input_ids": input_ids, "use_cache": False}
    model = base_of(model)  # an adapter passes on what its base may not take
    attention = attention_of(model)
    if "flash" in attention:
        input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
    inputs: dict[str, Any] = {
        "input_ids": input_ids, "position_ids": position_ids, "use_cache": False,
    }  # fmt: skip
    if attention == VARLEN:
        inputs["attention_mask"] = as_mask(borders_of(position_ids) if borders is None else borders)
    accepted = _accepted(type(model).forward)
    return inputs if accepted is None else {k: v for k, v in inputs.items() if k in accepted}


@functools.cache
def _accepted(forward: Callable[..., Any]) -> frozenset[str] | None:
    """The arguments that a model's forward takes; None if it takes any."""
    parameters = inspect.signature(forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(parameters)


def reads_tokens(model: nn.Module) -> bool:
    """Whether a model is called with tokens, as `packed_inputs` does."""
    accepted = _accepted(type(model).forward)
    return accepted is None or "input_ids" in accepted


def packing_refusal(config: ModelConfig) -> str | None:
    """Why a recipe that packs documents cannot train this model, as a sentence; None if it may."""
    adapter = kind_of(getattr(config, "peft_config", None) or {})
    if adapter in PROMPTS:
        name = adapter.lower().replace("_", " ")
        return f"{name} puts its virtual tokens before the row, not before each packed document"
    shape = described(config)
    kind = shape.get("model_type")
    reason = cannot_isolate(kind, shape) if isinstance(kind, str) else None
    return f"{kind} cannot keep packed documents apart: {reason}" if reason else None


def check_isolation(model: nn.Module, *, vocab_size: int, device: str, rows: int = 2) -> None:
    """Prove on the model itself that a packed document does not see the one before it.

    The tokens of document A in rows [A|B] are changed; the logits of B must not move by more than
    rounding, measured against how far they move when A and B are one document. rows: the
    micro-batch size. All ranks must call it, after the engine was made, which puts the model on its
    device and lets ZeRO-3 gather in the forward. Modes and random generators stay as they were.
    Raises RecipeError naming the model type.
    """
    leak = _leak(model, vocab_size=vocab_size, device=device, rows=rows)
    if leak > _rounding(model):
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", type(model).__name__)
        attention = getattr(config, "_attn_implementation", "") or "its"
        raise RecipeError(
            Problem(
                f"{kind} with {attention} attention lets packed documents see each other",
                place="data.pack_samples",
                hint="set it to false, or set model.attn_implementation to sdpa",
            )
        )


def _rounding(model: nn.Module) -> float:
    """How large `_leak` may be for reasons of rounding alone.

    A masked key weighs exactly nothing, so mostly it is 0. Experts get other numbers of tokens when
    A changes, hence other matrix shapes. Measured: 1e-7 in fp32; a convolution at random weights
    leaks 7e-4.
    """
    import torch

    config = getattr(model, "config", None)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float32:
        return 1e-5
    return 2e-2 if any(getattr(config, key, None) for key in _EXPERTS) else 1e-3


def _leak(model: nn.Module, *, vocab_size: int, device: str, rows: int) -> float:
    """How far B's logits move when A changes, relative to the same if A and B are one document."""
    import torch

    length, border = 24, torch.tensor([[11 + row % 3] for row in range(rows)])
    places = torch.arange(length).expand(rows, length)
    tokens = (places * 7 + 3) % vocab_size
    changed = torch.where(places < border, (tokens + vocab_size // 2) % vocab_size, tokens)
    packed = torch.where(places < border, places, places - border)
    after = (places >= border).to(device)
    with evaluating(model), untouched_randomness(), torch.no_grad():

        def logits(ids: Tensor, positions: Tensor) -> Tensor:
            output = model(**packed_inputs(model, ids.to(device), positions.to(device))).logits
            result: Tensor = output.float().view(rows, length, -1)
            return result

        def moved(positions: Tensor) -> float:
            change = logits(tokens, positions) - logits(changed, positions)
            return float(change.abs()[after].max())

        apart, together = moved(packed), moved(places)
    return apart / together if together > 0 else float(apart > 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every part of the model is in eval mode; afterwards each is as it was."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
