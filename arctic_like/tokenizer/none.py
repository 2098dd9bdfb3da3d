"""`type: none`: for models that read no text."""

from __future__ import annotations

from typing import Any

from arctic_like.tokenizer.base import TokenizerConfig, TokenizerFactory


class NoTokenizerConfig(TokenizerConfig):
    """`type: none`."""

    type: str = "none"
    """`none`: there is no text."""


class NoTokenizerFactory(TokenizerFactory):
    """No tokenizer; whoever asks for one gets None."""

    name = "none"
    config_type = NoTokenizerConfig

    def build(self, model_name_or_path: str | None = None) -> Any:
        """None."""
        return None
