"""Make a transformers model, whole or partitioned while it is made (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from arctic_like.model.initial import initialise
from arctic_like.model.randomness import seed_by_name, untouched_randomness

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

CAUSAL = "AutoModelForCausalLM"


def from_config(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    zero: dict[str, Any] | None,
    auto: str = CAUSAL,
    **options: Any,
) -> PreTrainedModel:
    """A model of that shape with random weights.

    zero: the DeepSpeed dictionary at ZeRO-3, else None. auto: the name of transformers' class that makes
    it. options: for `from_config`.
    """
    from transformers.initialization import no_init_weights

    with untouched_randomness(), ExitStack() as stack:
        # `initialise` draws the weights; what a constructor draws itself, it draws from here.
        seed_by_name(seed, "")
        stack.enter_context(no_init_weights())
        if zero is not None:
            stack.enter_context(_partitioned(zero))
        model: PreTrainedModel = _auto(auto).from_config(config, dtype=dtype, **options)
    model.tie_weights()
    initialise(model, seed=seed)
    return model


def unfilled(
    config: PretrainedConfig, *, dtype: torch.dtype, auto: str = CAUSAL, **options: Any
) -> PreTrainedModel:
    """A model of that shape whose weights hold nothing of meaning."""
    from transformers.initialization import no_init_weights

    with untouched_randomness(), no_init_weights():
        model: PreTrainedModel = _auto(auto).from_config(config, dtype=dtype, **options)
    model.tie_weights()
    return model


def from_pretrained(
    name_or_path: str,
    *,
    dtype: torch.dtype,
    seed: int,
    zero: dict[str, Any] | None,
    auto: str = CAUSAL,
    **options: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model with a checkpoint's weights, and the names of those it did not bring.

    These are drawn by name. zero, auto: as of `from_config`; options: for `from_pretrained`.
    """
    with untouched_randomness(), ExitStack() as stack:
        seed_by_name(seed, "")
        if zero is not None:
            stack.enter_context(zero3_for_transformers(zero))
        model, info = _auto(auto).from_pretrained(
            name_or_path, dtype=dtype, output_loading_info=True, **options
        )
    missing = _missing(model, info)
    if missing:
        initialise(model, seed=seed, names=missing)
    return model, missing


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _missing(model: PreTrainedModel, info: dict[str, Any]) -> list[str]:
    """Parameters that neither the checkpoint nor a tie to one of its weights has filled."""
    absent = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    tied = getattr(model, "all_tied_weights_keys", {})
    return sorted(name for name in absent if tied.get(name, name) in absent)


@contextmanager
def _partitioned(zero: dict[str, Any]) -> Iterator[None]:
    import deepspeed
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    # Rotary tables are computed in fp32 whatever the weights' dtype; must be entered first.
    with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=zero):
        yield


@contextmanager
def zero3_for_transformers(zero: dict[str, Any]) -> Iterator[None]:
    """Tell transformers to partition while it loads; it keeps only a weak reference to this."""
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    class _Zero3:
        # transformers' HfDeepSpeedConfig needs accelerate for these two alone.
        config = zero

        def is_zero3(self) -> bool:
            return True

    holder = _Zero3()
    set_hf_deepspeed_config(holder)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
