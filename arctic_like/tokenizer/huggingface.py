"""Tokenizers from the Hub or a folder, through `AutoTokenizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_like.errors import Problem, RecipeError
from arctic_like.tokenizer.base import TokenizerConfig, TokenizerFactory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HFTokenizerConfig(TokenizerConfig):
    """A tokenizer that `AutoTokenizer.from_pretrained` can load."""

    type: str = "huggingface"

    revision: str | None = None
    """Branch, tag or commit on the Hub; by default its main branch."""

    trust_remote_code: bool = False
    """Whether code that comes with the tokenizer may run."""


class HFTokenizerFactory(TokenizerFactory):
    """`type: huggingface`: the model's own tokenizer, or the one that `name_or_path` names."""

    name = "huggingface"
    config_type = HFTokenizerConfig
    config: HFTokenizerConfig

    def create(self, model_name_or_path: str | None) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        name = self.config.name_or_path or model_name_or_path
        if not name:
            raise RecipeError(
                Problem(
                    "no tokenizer is named, and a model with random weights brings none",
                    place="tokenizer.name_or_path",
                    hint="set tokenizer.name_or_path, or tokenizer.type: byte (needs no files)",
                )
            )
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name,
                revision=self.config.revision,
                trust_remote_code=self.config.trust_remote_code,
            )
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(_not_loadable(name, error)) from error
        if not tokenizer.is_fast:
            raise RecipeError(
                Problem(
                    f"{name} has only a slow tokenizer ({type(tokenizer).__name__}), which cannot "
                    "say which characters a token stands for",
                    place="tokenizer.name_or_path",
                    hint="name a tokenizer that has a tokenizer.json",
                )
            )
        return tokenizer


def _not_loadable(name: str, error: Exception) -> Problem:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Problem(
        f"the tokenizer {name!r} cannot be loaded: {reason.strip()}",
        place="tokenizer.name_or_path",
        hint="give a Hub name that this machine can reach, or a folder with a tokenizer.json",
    )
