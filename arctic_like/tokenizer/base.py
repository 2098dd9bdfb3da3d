"""What a recipe's `tokenizer:` describes, and the base of everything that builds one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.config.base import PartConfig
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerConfig(PartConfig):
    """The recipe's `tokenizer:`."""

    not_yet = {
        "tokenize_kwargs": "data.max_length cuts documents; tokenizer.chat_template shapes them",
    }

    type: str = "huggingface"
    """Which tokenizer: `huggingface`, `byte`, or a user's own."""

    name_or_path: str = ""
    """Hub name or folder of the tokenizer; empty is the model's `name_or_path`."""

    tokenize_kwargs: dict[str, Any] | None = None
    """Arguments for every call of the tokenizer. Accepted in recipes, refused before a run."""

    chat_template: str = ""
    """A Jinja chat template, or the path of a file that holds one; empty is the tokenizer's own."""


class TokenizerFactory(Part, family="tokenizer"):
    """Builds the tokenizer of a run.

    A subclass writes `create`; `build` is what the trainer calls, and does what holds for all.
    """

    config_type = TokenizerConfig
    config: TokenizerConfig

    def create(self, model_name_or_path: str | None) -> PreTrainedTokenizerBase:
        """The tokenizer itself; `model_name_or_path` is the model's, None for random weights."""
        raise NotImplementedError

    def build(self, model_name_or_path: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer, with tokens for end and padding and the chat template that was asked for.

        Pads on the right. Raises RecipeError where it cannot be had or lacks what training needs.
        """
        tokenizer = self.create(model_name_or_path)
        if tokenizer.eos_token_id is None:
            raise RecipeError(
                Problem(
                    "the tokenizer has no end-of-sequence token, so a document could not end",
                    place="tokenizer",
                    hint="name another tokenizer, or save this one with an eos_token set",
                )
            )
        if tokenizer.pad_token_id is None:
            # Padding is never trained and never seen (labels -100, a document of its own), so any
            # token will do; a new one would have to grow the model.
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        if self.config.chat_template:
            tokenizer.chat_template = read_template(self.config.chat_template)
        return tokenizer


def read_template(template: str) -> str:
    """The text of a chat template that is given as text or as a path.

    Anything with Jinja's `{` or a line break is the template itself. Raises RecipeError for a path
    that is no file.
    """
    if "{" in template or "\n" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise RecipeError(
            Problem(
                f"{template!r} is neither a Jinja template nor a file",
                place="tokenizer.chat_template",
                hint="write the template itself, or the path of a file that holds it",
            )
        )
    return path.read_text(encoding="utf-8")
