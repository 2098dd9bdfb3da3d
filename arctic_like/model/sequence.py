"""Models of transformers whose attention is shared among the ranks of a group (`arctic_like.sequence`).

A layer's attention is replaced by name, as transformers provides for: `ulysses_sdpa` is `sdpa` over whole
rows, of which this rank brings a part. What says that a call is shared is its attention mask: the borders
of the documents (`sequence.borders_of`) as a tensor of four dimensions, which models hand down to their
layers as it is, also where activations are computed again. Any other call is that of the plain attention, so
that generation, probes and exports are as without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.model.attention import (
    REFUSED,
    as_mask,
    base_of,
    hidden_rule,
    is_borders,
    mask_of,
    set_attention,
)
from arctic_like.model.attention_choice import AUTO
from arctic_like.model.isolation import cannot_isolate, described, evaluating, packed_inputs
from arctic_like.model.randomness import untouched_randomness
from arctic_like.sequence import SequenceGroup, borders_of, ulysses

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.model.base import ModelConfig

PREFIX = "ulysses_"
CORES = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Attention implementations that can be shared."""


def sharing_refusal(config: ModelConfig, size: int) -> tuple[str, str, str] | None:
    """Why a recipe's model cannot be shared among `size` ranks, as (message, key of the model's config,
    way out); None as far as the recipe, or a local folder's config.json, can tell."""
    from arctic_like.model.adapters.config import PROMPTS, kind_of

    adapter = kind_of(getattr(config, "peft_config", None) or {})
    if adapter in PROMPTS:
        name = adapter.lower().replace("_", " ")
        message = f"is {name}, whose virtual tokens stand before a row, not before each rank's part"
        return message, "peft_config", "use lora, or leave sequence_parallel_size out"
    attention = getattr(config, "attn_implementation", AUTO)
    if attention not in (*CORES, AUTO):
        return (
            f"is {attention!r}, which cannot be shared among ranks", "attn_implementation",
            f"use one of {', '.join(CORES)}, or leave sequence_parallel_size out",
        )  # fmt: skip
    shape = described(config)
    reason = _architecture(shape.get("model_type"), shape) or _heads(shape, size)
    return reason and (reason, "", "leave sequence_parallel_size out")  # type: ignore[return-value]


def share_attention(model: nn.Module, group: SequenceGroup) -> None:
    """Let the model's attention take part in `group`, where a call asks for it (`shared_inputs`).

    model: of transformers, perhaps in an adapter. Raises RecipeError naming what cannot be shared.
    """
    base: Any = base_of(model)
    core = base.config._attn_implementation
    text = base.config.get_text_config()
    shape = {"num_attention_heads": getattr(text, "num_attention_heads", None)}
    reason = _architecture(base.config.model_type, text.to_dict()) or _heads(shape, group.size)
    if reason is None and core not in CORES:
        reason = f"{base.config.model_type} runs with {core} attention, which cannot be shared"
    if reason is None and not set_attention(base, _registered(core, group)):
        reason = f"{base.config.model_type} has an attention of its own, which cannot be shared"
    if reason is not None:
        raise RecipeError(_problem(reason))


def shared_inputs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, borders: Tensor
) -> dict[str, Any]:
    """What a model with shared attention is called with.

    input_ids, position_ids: (rows, part), this rank's; borders: (documents + 1,) int32 of the whole rows.
    """
    inputs = packed_inputs(model, input_ids, position_ids)
    # flash attention would have the rows laid end to end, which only whole rows can be
    own = {"input_ids": input_ids, "position_ids": position_ids}
    return {k: own.get(k, v) for k, v in inputs.items()} | {"attention_mask": as_mask(borders)}


def check_sharing(
    model: nn.Module, group: SequenceGroup, *, vocab_size: int, device: str, rows: int = 2
) -> None:
    """Prove on the model itself that shared rows give the logits of whole ones.

    Rows of three documents, with borders inside the parts, go through the model whole, on every rank, and
    shared. How far the two lie apart is measured against how far a rank's part lies from the whole if it
    sees nothing but itself. All ranks must call it, after the engine was made. Modes and random
    generators stay as they were. Raises RecipeError naming the model type.
    """
    apart = _apart(model, group, vocab_size=vocab_size, device=device, rows=rows)
    import torch

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # measured on a CPU: at most 4e-7 in fp32 over 40 architectures, 0 in bf16 over ten; bidirectional or
    # blockwise attention lies 1 to 5 off. A GPU may round the two ways differently.
    if apart > (1e-3 if dtype == torch.float32 else 8e-2):
        kind = base_of(model).config.model_type
        raise RecipeError(
            _problem(f"{kind} computes other logits where ranks share a row ({apart:.2g} off)")
        )


def _apart(
    model: nn.Module, group: SequenceGroup, *, vocab_size: int, device: str, rows: int
) -> float:
    import torch

    part = 11
    length = part * group.size
    places = torch.arange(length).expand(rows, length)
    tokens = (places * 7 + 3 + torch.arange(rows)[:, None]) % vocab_size
    # a short document, and one over the border of two parts
    first, second = 5, part + 4 + torch.arange(rows)[:, None]
    positions = torch.where(places < first, places, places - first)
    positions = torch.where(places < second, positions, places - second)
    borders = borders_of(positions).to(device)
    tokens, positions = tokens.to(device), positions.to(device)
    mine = {"input_ids": group.part(tokens), "position_ids": group.part(positions)}
    with evaluating(model), untouched_randomness(), torch.no_grad():

        def logits(inputs: Mapping[str, Any], count: int) -> Tensor:
            found: Tensor = model(**inputs).logits.float().view(rows, count, -1)
            return found

        whole = group.part(logits(packed_inputs(model, tokens, positions), length))
        shared = logits(shared_inputs(model, **mine, borders=borders), part)
        alone = logits(packed_inputs(model, **mine), part)
    off, far = (group.whole((x - whole).abs().max()[None], dim=0) for x in (shared, alone))
    return float(off.max() / far.max()) if float(far.max()) > 0 else float(off.max() > 0)


def _architecture(model_type: Any, shape: Mapping[str, Any]) -> str | None:
    reason = cannot_isolate(model_type, shape) if isinstance(model_type, str) else None
    return f"{model_type} cannot be shared among ranks: {reason}" if reason else None


def _heads(shape: Mapping[str, Any], size: int) -> str | None:
    heads = next(
        (shape[k] for k in ("num_attention_heads", "n_head") if isinstance(shape.get(k), int)), 0
    )
    return f"{heads} attention heads cannot be shared among {size} ranks" if heads % size else None


def _problem(reason: str) -> Problem:
    hint = "leave it out, or train a model whose attention transformers lets be replaced"
    return Problem(f"cannot be used: {reason}", place="sequence_parallel_size", hint=hint)


class _Layer:
    """A layer's attention as its core sees it on a rank: other numbers of heads, the core's name."""

    def __init__(self, module: nn.Module, core: str, groups: int | None = None) -> None:
        self._module, self._core = module, core
        if groups is not None:
            self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @property
    def config(self) -> Any:
        return _Config(self._module.config, self._core)


class _Config:
    def __init__(self, config: Any, core: str) -> None:
        self._config, self._attn_implementation = config, core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _registered(core: str, group: SequenceGroup) -> str:
    """The name under which transformers now knows the shared form of an attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, **options: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        function = _core(core, module)
        if attention_mask is None or not is_borders(attention_mask):
            plain: tuple[Tensor, Any] = function(
                _Layer(module, core), query, key, value, attention_mask, **options
            )
            return plain
        _check_options(module, options)
        borders = attention_mask.flatten()
        passed = ("dropout", "scaling", "softcap")
        chosen: dict[str, Any] = {name: options[name] for name in passed if name in options}
        window = options.get("sliding_window")

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = _Layer(module, core, groups=q.shape[1] // k.shape[1])
            if "flash" in core:
                return _flash(function, layer, (q, k, v), borders, window, chosen)
            mask = mask_of(attention_mask, q, window, additive=core == "eager")
            found: Tensor = function(layer, q, k, v, mask, **chosen)[0]
            return found.transpose(1, 2)

        found = ulysses(attend, query, key, value, group=group)
        return found.transpose(1, 2).contiguous(), None

    name = PREFIX + core
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[core])
    return name


def _core(core: str, module: nn.Module) -> Callable[..., Any]:
    """transformers' attention of that name; `eager` is a function beside the model's own classes."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if core != "eager":
        found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[core]
        return found
    for kind in type(module).__mro__:
        own = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if own is not None:
            eager: Callable[..., Any] = own
            return eager
    raise RecipeError(
        _problem(f"{type(module).__name__} has no eager attention that can be shared among ranks")
    )


def _check_options(module: Any, options: Mapping[str, Any]) -> None:
    """Raise RecipeError for what a layer asks of its attention and this one cannot give."""
    kind = type(module).__name__
    for name in REFUSED:
        if options.get(name) is not None:
            raise RecipeError(
                _problem(f"{kind} gives its attention {name!r}, which cannot be shared")
            )
    if reason := hidden_rule(module, options):
        raise RecipeError(_problem(reason))


def _flash(
    function: Callable[..., Any], layer: _Layer, heads: tuple[Tensor, ...], borders: Tensor,
    window: int | None, options: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """Variable-length flash attention, the rows laid end to end."""
    rows, _, length, _ = heads[0].shape
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in heads)
    found: Tensor = function(
        layer, q, k, v, None, sliding_window=window, cu_seq_lens_q=borders, cu_seq_lens_k=borders,
        max_length_q=length, max_length_k=length, **options,
    )[0]  # fmt: skip
    return found.view(rows, length, *found.shape[2:]).transpose(1, 2)
