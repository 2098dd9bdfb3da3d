"""Causal language models of transformers, pretrained or with random weights of a given shape."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import TORCH_DTYPES, DType, RecipePath
from arctic_like.errors import Problem, RecipeError
from arctic_like.model.adapters.config import check, check_model, kind_of
from arctic_like.model.attention import VARLEN
from arctic_like.model.attention_choice import AUTO, settle
from arctic_like.model.base import ModelConfig, ModelFactory, ModelFacts
from arctic_like.model.loading import CAUSAL

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.world import World


class HFModelConfig(ModelConfig):
    """A model of transformers. Exactly one of `name_or_path` and `config` is given."""

    not_yet = {
        "arch_variant": "name a model of the wanted shape, or give its shape in model.config",
    }
    no_effect = {"save_name": "an export is named by its step: exports/step-N in the run"}

    adapter_tasks: ClassVar[tuple[str, ...]] = ("CAUSAL_LM",)
    """peft's types of task that the model's kind may have."""

    type: str = "huggingface"

    config: dict[str, Any] | None = None
    """Random weights of this shape: `{model_type: llama, hidden_size: 256, …}`."""

    revision: str | None = None
    """Branch, tag or commit on the Hub; by default its main branch."""

    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    attn_implementation: str = AUTO
    """The attention: `auto` (the fastest that is correct here, see docs/speed.md), `varlen`, `sdpa`, `eager`,
    `flash_attention_2`, `flash_attention_3`, `flash_attention_4`, `flex_attention`."""

    disable_activation_checkpoint: bool = False
    """Keep all activations for the backward pass: `activation_checkpointing: none`."""

    activation_checkpointing: Literal["full", "selective", "none"] | Annotated[int, Field(ge=1)] = (
        "full"
    )
    """What layers compute again in the backward pass: all but their input (`full`); what is no matrix product
    and no attention (`selective`); nothing (`none`); every k-th layer in full (a whole number)."""

    compile: Literal["blocks"] | bool = False
    """`blocks` (or true): each layer compiled by itself with torch.compile (docs/speed.md)."""

    hf_config_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of the model's config, such as `attention_dropout: 0.1`."""

    arch_variant: str | None = None
    """Another shape of the same model. Accepted in recipes, refused before a run."""

    peft_config: dict[str, Any] | None = None
    """An adapter to train, all else frozen: `{type: lora, r: 16, target_modules: all-linear}`. The other
    keys are those of peft's config class; see docs/adapters.md."""

    adapter: RecipePath | None = None
    """A folder with an adapter of this base, to train on: peft's, or an export."""

    adapter_dtype: DType | None = None
    """The adapter's dtype in training, `dtype` unless given. `fp32` over a bf16 base: at ZeRO 0 to 2."""

    quantization: Literal["4bit", "8bit"] | None = None
    """The frozen base in 4 or 8 bits under an adapter (QLoRA); needs CUDA and the extra `qlora`."""

    save_name: str | None = None
    """Accepted from other recipes; without effect."""

    hidden_projections: dict[int, int] = Field(default_factory=dict)
    """Layer → width to which its hidden states are mapped; `hidden_projection` of `type: distill` sets it."""

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

    @model_validator(mode="after")
    def _one_way_to_checkpoint(self) -> Self:
        said = self.given("activation_checkpointing") and self.activation_checkpointing != "none"
        if said and self.disable_activation_checkpoint:
            raise wrong("and disable_activation_checkpoint are both given",
                        place="activation_checkpointing", hint="keep one of them")  # fmt: skip
        return self

    @field_validator("hidden_projections")
    @classmethod
    def _is_the_trainers(cls, value: dict[int, int]) -> dict[int, int]:
        if value:
            raise wrong("is the trainer's to set", hint="leave it out; set hidden_projection")
        return value

    @field_validator("peft_config")
    @classmethod
    def _of_peft(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            check(value, tasks=cls.adapter_tasks)
        return value

    @model_validator(mode="after")
    def _one_adapter(self) -> Self:
        check_model(self)
        return self

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained, and the model itself frozen."""
        return self.peft_config is not None or self.adapter is not None

    @property
    def adapter_task(self) -> str:
        """peft's type of what an adapter is trained for."""
        return self.adapter_tasks[0]

    @property
    def engine_dtype(self) -> DType:
        """The dtype of what is trained, which DeepSpeed makes all weights where it is a low one."""
        return self.adapter_dtype or self.dtype

    @property
    def keeps_activations(self) -> bool:
        """Whether nothing is computed again in the backward pass. A prefix is a cache, which transformers
        does not give to layers that are."""
        prefix = kind_of(self.peft_config or {}) == "PREFIX_TUNING"
        none = self.activation_checkpointing == "none"
        return prefix or none or self.disable_activation_checkpoint


class HFModelFactory(ModelFactory):
    """A causal language model of transformers, pretrained or with random weights."""

    name = "huggingface"
    config_type = HFModelConfig
    config: HFModelConfig
    shares_sequences: ClassVar[bool] = True
    auto_class: str = CAUSAL
    """The name of transformers' class that makes the model."""
    told_borders: ClassVar[bool] = True
    """Whether its models are called with `isolation.packed_inputs`, which says where documents begin."""
    missing_level: ClassVar[str] = "WARNING"
    """How weights are told of that a pretrained model does not bring."""
    _drawn: Sequence[str] = ()
    """Names of such weights of the model that was made."""

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
        """See `ModelFactory.build`. Ready to train: no cache, activations checkpointed if asked; under
        an adapter everything but the adapter is frozen."""
        from arctic_like.model.hf_config import set_generation

        # Where ranks share layers, each begins with all weights, and keeps its part.
        zero = ds_config if zero_stage == 3 and world.tensor_parallel_size == 1 else None
        config = self.create_config(tokenizer)
        base = self.create_model(config, seed=seed, world=world, zero=zero)
        set_generation(base, tokenizer)
        # A cache makes transformers forget the borders of packed documents.
        base.config.use_cache = False
        self._add_projections(base, seed=seed)
        ready: nn.Module = base
        if self.config.adapted:
            from arctic_like.model.adapters.recipe import adapted

            ready = adapted(
                base, self.config, tokenizer, seed=seed, zero=zero, world=world, drawn=self._drawn
            )
        settle(
            ready, self.config.attn_implementation, device=device,
            dtype=TORCH_DTYPES[self.config.dtype], borders=self.told_borders,
            shared=world.sequence_parallel_size > 1,
            say=world.is_main,
        )  # fmt: skip
        if not self.config.keeps_activations:
            from arctic_like.model.activations import checkpoint_activations

            checkpoint_activations(base, self.config.activation_checkpointing)
        if self.config.compile:
            from arctic_like.model.compiled import compile_blocks

            compile_blocks(base, device=device, zero_stage=zero_stage)
        return ready.train()

    def for_weights(self, *, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> nn.Module:
        """The model on the CPU with weights yet to come: nothing is drawn, no weights are read. Of a
        model with an adapter it is the adapter's weights that are to come, and the base is there."""
        from arctic_like.model.hf_config import set_generation
        from arctic_like.model.loading import unfilled
        from arctic_like.world import World

        if self.config.adapted:
            return self.build(
                tokenizer=tokenizer,
                seed=seed,
                world=World(),
                device="cpu",
                zero_stage=0,
                ds_config={},
            )
        model = unfilled(self.create_config(tokenizer), auto=self.auto_class, **self._options())
        if self.config.name_or_path:
            self._take_generation(model)
        set_generation(model, tokenizer)
        self._add_projections(model, seed=seed)
        ready: nn.Module = model
        return ready

    def _add_projections(self, model: PreTrainedModel, *, seed: int) -> None:
        if self.config.hidden_projections:
            from arctic_like.model.projections import add_projections

            add_projections(model, self.config.hidden_projections, seed=seed)

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

        shared = {**self._options(), "auto": self.auto_class, "seed": seed, "zero": zero}
        if self.config.quantization:
            from arctic_like.model.adapters.quantised import loading_options

            shared |= loading_options(
                self.config.quantization, dtype=shared["dtype"], device=world.device,
                zero3=zero is not None,
            )  # fmt: skip
        try:
            if self.config.config is not None:
                return from_config(config, **shared)
            model, missing = from_pretrained(
                self.config.name_or_path, config=config, revision=self.config.revision, **shared
            )
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(self._not_buildable(error)) from error
        self._drawn = missing
        if missing and world.is_main:
            from loguru import logger

            logger.log(
                self.missing_level,
                f"{self.config.name_or_path} has no values for {', '.join(missing)}: "
                "they start from random weights",
            )
        return model

    def _options(self) -> dict[str, Any]:
        import torch

        # None is transformers' own choice: sdpa, or eager for the few models without it.
        given = self.config.attn_implementation not in (AUTO, VARLEN)
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
