"""A base model with the adapter that a recipe's `model:` describes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.config.values import TORCH_DTYPES
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.model.huggingface import HFModelConfig
    from arctic_like.world import World


def adapted(
    base: PreTrainedModel,
    config: HFModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    zero: dict[str, Any] | None,
    world: World,
    drawn: Collection[str] = (),
) -> nn.Module:
    """The model with its adapter, all else frozen; says what is trained, and what of the vocabulary is not.

    zero: the DeepSpeed dictionary where `base` is partitioned (ZeRO-3). drawn: names of parameters that
    its checkpoint did not bring. Raises RecipeError.
    """
    import torch
    from loguru import logger

    from arctic_like.model.adapters import build, tasks, vocabulary

    if zero is not None and config.engine_dtype != config.dtype:
        raise RecipeError(
            Problem(
                f"is {config.adapter_dtype}, and ZeRO stage 3 keeps all weights in one dtype",
                place="model.adapter_dtype",
                hint="leave it out, or set deepspeed.zero_optimization.stage to 2",
            )
        )
    about = {
        "name_or_path": config.name_or_path or None, "revision": config.revision,
        "dtype": config.dtype, "quantization": config.quantization,
        **tasks.labels_of(base, config.adapter_task),
    }  # fmt: skip
    dtype = getattr(torch, TORCH_DTYPES[config.engine_dtype])
    if config.adapter is not None:
        model = build.from_folder(
            base,
            Path(config.adapter),
            about=about,
            zero=zero,
            dtype=dtype,
            task=config.adapter_task,
        )
    else:
        model = build.from_recipe(
            base, config.peft_config or {}, about=about, seed=seed, zero=zero, dtype=dtype,
            rows=len(tokenizer), task=config.adapter_task, drawn=drawn,
        )  # fmt: skip
    rows = base.config.get_text_config().vocab_size
    if rows < len(tokenizer):
        raise RecipeError(
            Problem(
                f"is an adapter over {rows} tokens, and the tokenizer has {len(tokenizer)}",
                place="model.adapter",
                hint="name the tokenizer that lies in its folder: tokenizer.name_or_path",
            )
        )
    if world.is_main:
        logger.info(build.summary(model))
        untrained = vocabulary.untrained(model, tokenizer, _own_tokenizer(config, tokenizer))
        for sentence in (untrained, vocabulary.parted(model)):
            if sentence:
                logger.warning(sentence)
    return model  # type: ignore[no-any-return]


def _own_tokenizer(
    config: HFModelConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with the pretrained model, where the recipe names another one."""
    from transformers import AutoTokenizer

    name = config.name_or_path
    if not name or tokenizer.name_or_path == name:
        return None
    with contextlib.suppress(OSError, ValueError, ImportError, KeyError):
        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=config.revision)
        return own
    return None
