"""`varlen`: attention over packed rows by torch's own variable-length flash kernel.

Registered with transformers by name, as it provides for. What tells documents apart is the call's attention
mask: their borders (`sequence.borders_of`) as an int32 tensor of four dimensions, which models hand down to
their layers as it is, also where activations are computed again. On CUDA in bf16 or fp16 the rows are laid
end to end and `torch.nn.attention.varlen` computes each document by itself, windows included; no mask of
length × length is made and nothing waits for the device. On other devices, in other dtypes and with dropout
the same call is sdpa under a block mask. Any call without borders is plain sdpa, so that generation, probes
and exports are as without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.sequence.rows import block_mask, borders_of

if TYPE_CHECKING:
    from torch import Tensor, nn

VARLEN = "varlen"
MAX_HEAD_DIM = 256
"""The widest head that the flash kernels take."""
REFUSED = ("s_aux", "position_bias")
"""What some models give their attention that neither the kernel nor ranks that share heads can honour."""


def base_of(model: nn.Module) -> Any:
    """The transformers model inside an adapter; others are themselves."""
    from arctic_like.model.adapters.build import is_adapted

    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def attention_of(model: nn.Module) -> str:
    """The name of the attention that a transformers model runs with; "" where it has none."""
    config = getattr(base_of(model), "config", None)
    return str(getattr(config, "_attn_implementation", "") or "")


def set_attention(model: nn.Module, name: str) -> bool:
    """Let a transformers model run with that attention from now on. False, and nothing changed, where it
    does not let it be replaced."""
    base = base_of(model)
    before = base.config._attn_implementation
    if name == VARLEN:
        _register()
    base.set_attn_implementation(name)
    if base.config._attn_implementation == name:
        return True
    base.set_attn_implementation(before)
    return False


def as_mask(borders: Tensor) -> Tensor:
    """Borders (documents + 1,) in the form of an attention mask that models hand down: (1, 1, 1, ·) int32."""
    return borders[None, None, None]


def is_borders(mask: Tensor | None) -> bool:
    """Whether what a layer got as its mask are the borders of documents."""
    import torch

    return mask is not None and mask.dtype == torch.int32


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """A layer's attention, with transformers' signature.

    query: (rows, heads, length, width); key, value: (rows, key heads, length, ·). attention_mask: borders of
    the rows laid end to end, or what sdpa takes. Returns (rows, length, heads, value width). Raises
    RecipeError for a layer whose attention it cannot compute.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or not is_borders(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    # a compiled layer would be compiled anew for each layer's number; the proof before the run is eager
    if not torch.compiler.is_compiling() and (reason := unshared(module, options)):
        raise RecipeError(_problem(reason))
    window, dropout = options.get("sliding_window"), options.get("dropout", 0.0)
    if dropout or not _usable(query):
        mask = mask_of(attention_mask, query, window, additive=False)
        passed = {name: options[name] for name in ("dropout", "scaling") if name in options}
        return sdpa_attention_forward(module, query, key, value, mask, **passed)  # type: ignore[no-any-return]
    return _end_to_end(
        query, key, value, attention_mask.flatten(), scale=options.get("scaling"), window=window
    ), None


def _end_to_end(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, *, scale: float | None, window: int | None
) -> Tensor:  # fmt: skip
    """The kernel over rows laid end to end: (rows, heads, length, ·) → (rows, length, heads, value width)."""
    import torch.nn.functional as F

    rows, heads, length, width = query.shape
    value_width, times = value.shape[-1], heads // key.shape[1]
    kernel: Any = _found_kernel()
    # the kernel wants one width for all three, a multiple of 8; zeros change no product
    padded = -(-max(width, value_width) // 8) * 8
    q, k, v = (
        F.pad(x, (0, padded - x.shape[-1])).transpose(1, 2).flatten(0, 1)
        for x in (query, key, value)
    )
    # `length` bounds every document; the longest would have to be asked of the device
    found: Tensor = kernel(
        q, k, v, borders, borders, length, length,
        scale=width**-0.5 if scale is None else scale,
        # a window of w sees itself and the w - 1 before it
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=times > 1,
    )  # fmt: skip
    return found.view(rows, length, heads, padded)[..., :value_width]


def unshared(module: Any, options: Mapping[str, Any]) -> str | None:
    """What a layer asks of its attention beyond document borders, scale and window; None if nothing."""
    kind = type(module).__name__
    for name in (*REFUSED, "softcap"):
        if options.get(name) is not None:
            return f"{kind} gives its attention {name!r}"
    return hidden_rule(module, options)


def hidden_rule(module: Any, options: Mapping[str, Any]) -> str | None:
    """Whether who sees whom in a layer is written in its mask alone, which borders replace."""
    kinds, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    layer = kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else ""
    windowless = layer == "sliding_attention" and options.get("sliding_window") is None
    if windowless or "chunked" in layer or options.get("is_causal") is False:
        kind = type(module).__name__
        return f"{kind}, layer {index} ({layer or 'not causal'}), does not tell its attention who sees whom"
    return None


def mask_of(carrier: Tensor, query: Tensor, window: int | None, *, additive: bool) -> Tensor | None:
    """The mask of whole rows, made once for all layers of a forward: kept on the tensor that the layers are
    given. additive: in the query's dtype, never None, as eager attention wants it."""
    import torch

    rows, _, length, _ = query.shape
    if torch.compiler.is_compiling():
        return block_mask(carrier.flatten(), rows=rows, length=length, window=window)
    kept: dict[Any, Tensor | None] = carrier.__dict__.setdefault("masks", {})
    key = (rows, length, window, query.dtype if additive else None)
    if key not in kept:
        mask = block_mask(carrier.flatten(), rows=rows, length=length, window=window)
        if additive:
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            low = torch.finfo(query.dtype).min
            mask = query.new_zeros(mask.shape).masked_fill_(~mask, low).expand(rows, 1, -1, -1)
        kept[key] = mask
    return kept[key]


def check_varlen(model: nn.Module, *, vocab_size: int, device: str, rows: int = 2) -> str | None:
    """Run the model both ways on a few tokens: with borders, and by sdpa. None if the logits agree, else
    a sentence.

    Rows of three documents. How far the two lie apart is measured against how far the logits move if
    each row is one document. All ranks must call it, after the engine was made. Modes and random generators
    stay as they were.
    """
    import torch

    from arctic_like.model.isolation import evaluating, packed_inputs
    from arctic_like.model.randomness import untouched_randomness

    length, first = 33, 5
    places = torch.arange(length).expand(rows, length)
    second = 17 + torch.arange(rows)[:, None]
    positions = torch.where(places < first, places, places - first)
    positions = torch.where(places < second, positions, places - second)
    tokens = ((places * 7 + 3 + torch.arange(rows)[:, None]) % vocab_size).to(device)
    apart, together = borders_of(positions), borders_of(places)
    inputs = packed_inputs(model, tokens, positions.to(device), borders=apart.to(device))
    if "attention_mask" not in inputs:
        return "the model takes no attention mask"
    with evaluating(model), untouched_randomness(), torch.no_grad():

        def logits(mask: Tensor | None) -> Tensor:
            given = {**inputs, "attention_mask": mask}
            found: Tensor = model(**given).logits.float()
            return found

        expected = logits(None)
        try:
            found = logits(inputs["attention_mask"])
            joined = logits(as_mask(together.to(device)))
        except RecipeError as error:
            return error.problems[0].message
        off = float((found - expected).norm())
        far = float((joined - expected).norm())
    # Low precision rounds the two kernels differently; a border or a window that is not kept is 1.
    if off <= 0.25 * far or off <= 1e-6 * float(expected.norm()):
        return None
    return f"its logits are {off / far if far else float('inf'):.2g} off those of sdpa"


def available() -> bool:
    """Whether this torch has the kernel, with windows."""
    return _found_kernel() is not None


def _usable(query: Tensor) -> bool:
    import torch

    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] <= MAX_HEAD_DIM and available()


def _found_kernel() -> Callable[..., Any] | None:
    """torch's function; None where this torch has none."""
    if not _FOUND:
        _FOUND.append(_load())
    return _FOUND[0]


_FOUND: list[Callable[..., Any] | None] = []
"""What `_load` found, once: layers that are compiled can read a list, and import nothing."""


def _load() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= known:  # torch 2.10
        return None
    return varlen_attn if "enable_gqa" in known else repeating(varlen_attn)


def repeating(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that wants as many key heads as query heads, for fewer of them."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *rest: Any, enable_gqa: bool, **options: Any
    ) -> Any:
        if enable_gqa:
            times = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        return kernel(query, key, value, *rest, **options)

    return attend


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    available()
    AttentionInterface.register(VARLEN, varlen_attention)
    # for calls without borders; a mask of four dimensions is handed down as it is
    AttentionMaskInterface.register(VARLEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _problem(reason: str) -> Problem:
    hint = "leave it out, or set it to sdpa or eager"
    return Problem(f"'{VARLEN}' cannot be used: {reason}", "model.attn_implementation", hint)
