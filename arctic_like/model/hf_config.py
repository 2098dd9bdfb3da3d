"""The transformers config of a model: what the recipe says and what the tokenizer adds."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.model.base import ModelFacts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.model.huggingface import HFModelConfig

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
"""Older names that transformers still reads, and moves into `rope_parameters`."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_length")


def create_config(
    config: HFModelConfig, tokenizer: PreTrainedTokenizerBase | None
) -> PretrainedConfig:
    """The config for `from_config` and `from_pretrained`.

    The tokenizer gives a missing vocabulary size and the special tokens of random weights. Raises
    RecipeError for a model that cannot be had, for keys that its config does not know and where the
    vocabulary is smaller than the tokenizer's.
    """
    result = _random(config, tokenizer) if config.config is not None else _pretrained(config)
    _check_keys(type(result), config.hf_config_kwargs, place="model.hf_config_kwargs")
    for key, value in config.hf_config_kwargs.items():
        setattr(result, key, value)
    if tokenizer is not None:
        _check_vocabulary(result.get_text_config(), tokenizer, config)
    return result


def facts_of(config: PretrainedConfig) -> ModelFacts:
    """The facts that a transformers config holds."""
    text = config.get_text_config()
    positions = (getattr(text, key, None) for key in _POSITIONS[:-1])
    return ModelFacts(
        model_type=config.model_type,
        max_positions=next((value for value in positions if isinstance(value, int)), None),
        hidden_size=getattr(text, "hidden_size", None),
        num_layers=getattr(text, "num_hidden_layers", None),
        vocab_size=getattr(text, "vocab_size", None),
    )


def set_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation end where the tokenizer's documents end, and pad with its padding token.

    The model's own config gets the tokens that it lacks, but never a padding token that is a real
    one too: `nn.Embedding` would not train it.
    """
    text = model.config.get_text_config()
    for key, value in special_tokens(tokenizer).items():
        if getattr(text, key, None) is None and value is not None:
            setattr(text, key, value)
    generation = model.generation_config
    if generation is None:
        return
    generation._from_model_config = False  # else transformers may derive it from the config again
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    if generation.bos_token_id is None:
        generation.bos_token_id = tokenizer.bos_token_id
    ends = generation.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    generation.eos_token_id = ends[0] if len(ends) == 1 else (ends or None)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The tokenizer's special token ids by config key; no pad where it is a real token too."""
    ids: dict[str, int | None] = {key: getattr(tokenizer, key, None) for key in _TOKENS}
    if ids["pad_token_id"] in (ids["bos_token_id"], ids["eos_token_id"]):
        ids["pad_token_id"] = None
    return ids


def _random(config: HFModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    given = dict(config.config or {})
    model_type = given.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        raise RecipeError(
            Problem(
                f"{model_type!r} is no model type of transformers",
                place="model.config.model_type",
                hint=f"did you mean {near[0]!r}?" if near else "llama, qwen3 and gpt2 are some",
            )
        )
    kind = CONFIG_MAPPING[model_type]
    _check_keys(kind, given, place="model.config")
    if tokenizer is not None:
        _check_vocabulary(SimpleNamespace(**given), tokenizer, config)
        given = {"vocab_size": len(tokenizer), **special_tokens(tokenizer), **given}
    try:
        result: PretrainedConfig = kind(**given)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RecipeError(
            Problem(f"{model_type} refuses it: {' '.join(reason)}", place="model.config")
        ) from error
    return result


def _pretrained(config: HFModelConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        result: PretrainedConfig = AutoConfig.from_pretrained(
            config.name_or_path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise RecipeError(
            Problem(
                f"the model {config.name_or_path!r} cannot be loaded: {reason.strip()}",
                place="model.name_or_path",
                hint="give a Hub name that this machine can reach, or a folder with a config.json",
            )
        ) from error
    return result


def _check_keys(kind: type[PretrainedConfig], given: dict[str, Any], *, place: str) -> None:
    """transformers takes any key and ignores what it does not know; a recipe is strict."""
    known = set(kind.attribute_map) | _ROPE
    for cls in kind.__mro__:
        if dataclasses.is_dataclass(cls):
            known |= {field.name for field in dataclasses.fields(cls)}
        known |= set(inspect.signature(cls).parameters) - {"args", "kwargs"}
    problems = []
    for key in given:
        if key not in known and not hasattr(kind, key):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else ""
            message = f"is no key of {kind.__name__}"
            problems.append(Problem(message, place=f"{place}.{key}", hint=hint))
    if problems:
        raise RecipeError(problems)


def _check_vocabulary(
    sizes: Any, tokenizer: PreTrainedTokenizerBase, config: HFModelConfig
) -> None:
    from arctic_like.model.adapters.vocabulary import trains_rows

    size = getattr(sizes, "vocab_size", None)
    grows = config.config is None and (
        trains_rows(config.peft_config) or config.adapter is not None
    )
    if isinstance(size, int) and size < len(tokenizer) and not grows:
        raise RecipeError(
            Problem(
                f"the model's vocab_size ({size}) is smaller than the tokenizer's "
                f"({len(tokenizer)} tokens)",
                place="model.config.vocab_size" if config.config else "model.name_or_path",
                hint="leave vocab_size out: the tokenizer's is taken"
                if config.config
                else "name the tokenizer that belongs to the model; an adapter trains new tokens with "
                "model.peft_config.modules_to_save: [embed_tokens, lm_head]",
            )
        )
