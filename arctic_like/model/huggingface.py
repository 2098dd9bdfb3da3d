"""Causal language models of transformers, pretrained or with random weights of a given shape."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import TORCH_DTYPES
from arctic_like.errors import Problem, RecipeError
from arctic_like.model.base import ModelConfig, ModelFactory, ModelFacts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.world import World


class HFModelConfig(ModelConfig):
    """A model of transformers. Exactly one of `name_or_path` and `config` is given."""

    not_yet = {
        "peft_config": "train all weights for now; leave peft_config out",
        "arch_variant": "name a model of the wanted shape, or give its shape in model.config",
    }
    no_effect = {"save_name": "an export is named by its step: exports/step-N in the run"}

    type: str = "huggingface"

    config: dict[str, Any] | None = None
    """Random weights of this shape: `{model_type: llama, hidden_size: 256, …}`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub; by default its main branch."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    attn_implementation: str = "sdpa"
    """The attention: `sdpa`, `eager`, `flash_attention_2`, …; unless given, eager where a model has
    no sdpa."""

    disable_activation_checkpoint: bool = False
    """Keep all activations for the backward pass, in place of computing them again."""

    hf_config_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of the model's config, such as `attention_dropout: 0.1`."""

    arch_variant: str | None = None
    """Another shape of the same model. Accepted in recipes, refused before a run."""

    peft_config: dict[str, Any] | None = None
    """Adapters. Accepted in recipes, refused before a run."""

    save_name: str | None = None
    """Accepted from other recipes; without effect."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        hint = "set model.name_or_path, or model.config: {model_type: llama, …} for random weights"
        if self.name_or_path and self.config is not None:
            raise wrong("and name_or_path are both given", place="config", hint="keep one of them")
        if not self.name_or_path and self.config is None:
            raise wrong("names no model", hint=hint)
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise wrong("says no model_type", place="config", hint="add model_type: llama")
        return self


class HFModelFactory(ModelFactory):
    """A causal language model of transformers, pretrained or with random weights."""

    name = "huggingface"
    config_type = HFModelConfig
    config: HFModelConfig

    def facts(self) -> ModelFacts:
        """Positions, sizes and the like from the model's config. Raises RecipeError as `build`."""
        from arctic_like.model.hf_config import facts_of

        facts = facts_of(self.create_config(None))
        if self.config.config is not None and "vocab_size" not in self.config.config:
            facts = replace(facts, vocab_size=None)
        return facts

    def create_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
        """The transformers config that the model is built from, with the tokenizer's facts."""
        from arctic_like.model.hf_config import create_config

        return create_config(self.config, tokenizer)

    def build(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        world: World,
        device: str,
        zero_stage: int,
        ds_config: dict[str, Any],
    ) -> nn.Module:
        """See `ModelFactory.build`. Ready to train: no cache, activations checkpointed if asked."""
        from arctic_like.model.hf_config import set_generation

        config = self.create_config(tokenizer)
        model = self.create_model(
            config, seed=seed, world=world, zero=ds_config if zero_stage == 3 else None
        )
        set_generation(model, tokenizer)
        # A cache makes transformers forget the borders of packed documents.
        model.config.use_cache = False
        if not self.config.disable_activation_checkpoint:
            self._checkpoint_activations(model)
        ready: nn.Module = model.train()
        return ready

    def for_weights(self, *, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The model on the CPU with weights yet to come: nothing is drawn, no weights are read."""
        from arctic_like.model.hf_config import set_generation
        from arctic_like.model.loading import unfilled

        model = unfilled(self.create_config(tokenizer), **self._options())
        if self.config.name_or_path:
            self._take_generation(model)
        set_generation(model, tokenizer)
        ready: nn.Module = model
        return ready

    def _take_generation(self, model: PreTrainedModel) -> None:
        """The generation config that comes with the pretrained model, if any does."""
        from transformers import GenerationConfig

        with contextlib.suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(
                self.config.name_or_path, revision=self.config.revision
            )

    def create_model(
        self, config: PretrainedConfig, *, seed: int, world: World, zero: dict[str, Any] | None
    ) -> PreTrainedModel:
        """The model with its initial weights; `zero`, the DeepSpeed dictionary, partitions it."""
        from arctic_like.model.loading import from_config, from_pretrained

        shared = {**self._options(), "seed": seed, "zero": zero}
        try:
            if self.config.config is not None:
                return from_config(config, **shared)
            model, missing = from_pretrained(
                self.config.name_or_path, config=config, revision=self.config.revision, **shared
            )
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(self._not_buildable(error)) from error
        if missing and world.is_main:
            from loguru import logger

            logger.warning(
                f"{self.config.name_or_path} has no values for {', '.join(missing)}: "
                "they start from random weights"
            )
        return model

    def _options(self) -> dict[str, Any]:
        import torch

        # None is transformers' own choice: sdpa, or eager for the few models without it.
        given = self.config.given("attn_implementation")
        return {
            "dtype": getattr(torch, TORCH_DTYPES[self.config.dtype]),
            "attn_implementation": self.config.attn_implementation if given else None,
            "trust_remote_code": self.config.trust_remote_code,
        }

    def _not_buildable(self, error: Exception) -> Problem:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        if "attention" in reason.lower():
            return Problem(
                f"{self.config.attn_implementation!r} cannot be used here: {reason.strip()}",
                place="model.attn_implementation",
                hint="leave it out, or set it to sdpa or eager, which need no package",
            )
        return Problem(
            f"the model cannot be built: {reason.strip()}",
            place="model.name_or_path" if self.config.name_or_path else "model.config",
        )

    def _checkpoint_activations(self, model: PreTrainedModel) -> None:
        # Renamed in transformers 5.18 or later; the old name warns from then on and goes in 6.
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise RecipeError(
                Problem(
                    f"{model.config.model_type} cannot checkpoint activations",
                    place="model.disable_activation_checkpoint",
                    hint="set it to true",
                )
            ) from error
