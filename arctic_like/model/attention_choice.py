"""`attn_implementation: auto`: the fastest attention that is correct for a model where it runs, and why.

`choose` is a pure function of `AttentionFacts`. Packed or not makes no difference to it: a padded row is
documents too. What is chosen is run against sdpa on the model itself before the first step
(`attention.check_varlen`), and left if it differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.model.attention import MAX_HEAD_DIM, VARLEN

if TYPE_CHECKING:
    from torch import nn

AUTO = "auto"
_HALF = ("bfloat16", "float16")
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_SOFTCAPS = ("attn_logit_softcapping", "attention_softcap", "attn_logits_soft_cap")
_WIDTHS = ("head_dim", "qk_head_dim", "v_head_dim", "global_head_dim")
_COMPATIBLE = (8, 0)
"""The CUDA capability that flash attention needs: Ampere."""


@dataclass(frozen=True)
class AttentionFacts:
    """What an attention is chosen by."""

    device: str = "cpu"
    """"cpu" or "cuda", perhaps with a number."""
    capability: tuple[int, int] = (0, 0)
    """Of the CUDA device."""
    dtype: str = "float32"
    """In which the attention computes: torch's name."""
    fallback: str = "sdpa"
    """What transformers takes for the model: sdpa, or eager where it has none or would leave out a cap."""
    borders: bool = True
    """Whether the model's calls say where documents begin (`isolation.packed_inputs`)."""
    replaceable: bool = True
    """Whether the model takes its attention by name."""
    flash: bool = True
    """Whether transformers gives the model flash attention."""
    head_dim: int = 64
    """The widest head."""
    softcap: bool = False
    dropout: float = 0.0
    """The share of attention weights that training drops."""
    virtual_tokens: bool = False
    """Whether an adapter puts tokens of its own before a row (prompt and prefix tuning)."""
    shared: bool = False
    """Whether ranks share rows (`sequence_parallel_size`)."""
    varlen: bool = True
    """Whether this torch has the variable-length kernel with windows."""
    packages: frozenset[int] = frozenset()
    """Which versions of flash attention are installed, of 2, 3 and 4."""


@dataclass(frozen=True)
class AttentionChoice:
    """An attention by transformers' name, and why it is taken."""

    implementation: str
    reason: str


def choose(facts: AttentionFacts) -> AttentionChoice:
    """The fastest attention that is correct.

    Flash attention of the generation that was written for the device, if its package is installed; torch's
    own variable-length kernel; flash attention 2; else what transformers takes. `flex_attention` is never
    chosen: it compiles kernels of its own, anew for other lengths.
    """

    def plainly(why: str) -> AttentionChoice:
        return AttentionChoice(facts.fallback, why)

    if not facts.device.startswith("cuda"):
        return plainly(f"flash kernels need CUDA, and this run is on {facts.device}")
    if facts.dtype not in _HALF:
        return plainly(f"flash kernels compute in bf16 and fp16, the model in {facts.dtype}")
    if facts.capability < _COMPATIBLE:
        return plainly("flash kernels need a device of capability 8.0 (Ampere)")
    if not facts.borders:
        return plainly("the model is called with padded texts and a mask")
    if not facts.replaceable:
        return plainly("the model's attention cannot be replaced by name")
    if facts.virtual_tokens:
        return plainly("virtual tokens stand before each row")
    if facts.head_dim > MAX_HEAD_DIM:
        return plainly(
            f"flash kernels take heads of {MAX_HEAD_DIM}, the model's are {facts.head_dim} wide"
        )
    own = {9: 3, 10: 4}.get(facts.capability[0], 2)
    if own > 2 and _installed(facts, own) and not facts.dropout and facts.head_dim <= 128:
        return AttentionChoice(f"flash_attention_{own}", "installed, and written for this device")
    obstacle = _varlen_obstacle(facts)
    if obstacle is None:
        reason = "torch's variable-length flash kernel: document by document, without a mask or a package"
        return AttentionChoice(VARLEN, reason)
    if _installed(facts, 2):
        return AttentionChoice("flash_attention_2", f"installed; {VARLEN} is out: {obstacle}")
    return plainly(
        f"{VARLEN} is out: {obstacle}; flash-attn is not installed, or not for this model"
    )


def _installed(facts: AttentionFacts, version: int) -> bool:
    return facts.flash and version in facts.packages


def _varlen_obstacle(facts: AttentionFacts) -> str | None:
    if not facts.varlen:
        return "this torch has no such kernel with windows"
    if facts.shared:
        return "ranks share rows"
    if facts.softcap:
        return "the model caps its attention scores"
    if facts.dropout:
        return "it has no attention dropout"
    if facts.fallback != "sdpa":
        return f"the model has no sdpa beside it ({facts.fallback})"
    return None


def facts_of(
    model: nn.Module, *, device: str, dtype: str, borders: bool = True, shared: bool = False
) -> AttentionFacts:
    """The facts of a transformers model that was built with transformers' own choice of attention."""
    from transformers.utils import import_utils

    from arctic_like.model.adapters.build import is_prompt
    from arctic_like.model.attention import available, base_of

    base = base_of(model)
    text = base.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1
    widths = [getattr(text, name, None) for name in _WIDTHS]
    known = [width for width in widths if isinstance(width, int)]
    derived = (getattr(text, "hidden_size", None) or 0) // heads
    return AttentionFacts(
        device=device, capability=_capability(device), dtype=dtype,
        fallback=_true_to_caps(base.config), borders=borders,
        replaceable=base._can_set_attn_implementation(),
        flash=bool(getattr(base, "_supports_flash_attn", False)),
        head_dim=max(known or [derived]),
        softcap=_caps_scores(base.config),
        dropout=max(_number(getattr(text, name, 0.0)) for name in _DROPOUTS),
        virtual_tokens=is_prompt(model), shared=shared, varlen=available(),
        packages=frozenset(
            version for version in (2, 3, 4)
            if getattr(import_utils, f"is_flash_attn_{version}_available", bool)()
        ),
    )  # fmt: skip


def _caps_scores(config: Any) -> bool:
    text = config.get_text_config()
    return any(getattr(text, name, None) for name in _SOFTCAPS)


def _true_to_caps(config: Any) -> str:
    """What transformers took. In 5.17 that is sdpa for Gemma 2, whose caps it leaves out."""
    taken: str = config._attn_implementation
    return "eager" if taken == "sdpa" and _caps_scores(config) else taken


def _capability(device: str) -> tuple[int, int]:
    if not device.startswith("cuda"):
        return (0, 0)
    import torch

    return torch.cuda.get_device_capability(device)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def settle(
    model: nn.Module,
    given: str,
    *,
    device: str,
    dtype: str,
    borders: bool,
    shared: bool,
    say: bool,
) -> None:
    """Give a model the attention that its recipe names.

    model: of transformers, perhaps in an adapter, built with transformers' own choice. given: `auto` or
    `varlen`; any other name was transformers' to take. borders, shared: see `AttentionFacts`. say: log what
    `auto` took, and why. Raises RecipeError where `varlen` cannot be had, or `sdpa` would not be the model.
    """
    from loguru import logger

    from arctic_like.errors import Problem, RecipeError
    from arctic_like.model.attention import base_of, set_attention

    base = base_of(model)
    before = base.config._attn_implementation
    why = ""
    if given in (VARLEN, "sdpa") and _caps_scores(base.config):
        why = "caps its scores, which would be left out"
    elif given == VARLEN and not (borders and before == "sdpa" and set_attention(model, VARLEN)):
        why = "cannot be replaced" if borders else "is given a mask, not borders"
    if why:
        raise RecipeError(
            Problem(
                f"is {given!r}, but the attention of {base.config.model_type} {why}",
                place="model.attn_implementation",
                hint="leave it out",
            )
        )
    if given != AUTO:
        return
    choice = choose(facts_of(model, device=device, dtype=dtype, borders=borders, shared=shared))
    if choice.implementation != before:
        try:
            taken = set_attention(model, choice.implementation)
            why = "the model does not let it be replaced"
        except (ImportError, ValueError, RuntimeError) as error:
            taken, why = False, str(error).splitlines()[0]
        if not taken:
            choice = AttentionChoice(before, f"{choice.implementation} cannot be had: {why}")
    if say:
        logger.info(f"attention: {choice.implementation}. Why: {choice.reason}")
