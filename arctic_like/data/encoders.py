"""Rows → tokens and masks: conversations, texts, rows that are tokenised already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import shapes
from arctic_like.data.base import Row, SourceConfig
from arctic_like.data.encode import Encoded, joined
from arctic_like.data.masks import TextEncoder, token_mask
from arctic_like.data.templates import ChatTemplate, Rendered
from arctic_like.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>\s*")


def _at(place: str, error: shapes.RowError) -> RecipeError:
    return RecipeError(f"{place} {error}")


class ConversationEncoder:
    """Renders conversations with the chat template and trains what the assistant wrote."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: SourceConfig,
        *,
        mask_inputs: bool,
        ignore_empty_think: bool,
    ) -> None:
        self.source = source
        self.mask_inputs = mask_inputs
        self.ignore_empty_think = ignore_empty_think
        self.template = ChatTemplate(tokenizer)
        self.encode = TextEncoder(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """Raises RecipeError naming the row that is broken or cannot be masked exactly."""
        rendered = [self._render(place, row) for place, row in rows]
        encodings = self.encode([one.text for one in rendered], add_special_tokens=False)
        counts: Counter[str] = Counter()
        tokens, trained = [], []
        for (place, _), one, encoding in zip(rows, rendered, encodings, strict=True):
            try:
                mask = token_mask(encoding, one.spans)
            except ValueError as error:
                raise RecipeError(f"{place} cannot be masked exactly: {error}") from None
            tokens.append(np.array(encoding.ids, dtype=np.int32))
            trained.append(mask.trained)
            counts["straddling"] += mask.straddling
            counts["endless"] += one.endless
        return joined([place for place, _ in rows], tokens, trained, counts)

    def _render(self, place: str, row: dict[str, Any]) -> Rendered:
        try:
            messages = shapes.conversation(row, self.source)
            if not self.mask_inputs:
                plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
                text = self.template.render(plain)
                return Rendered(text, [(0, len(text))])
            found = self.template.trained(messages)
        except shapes.RowError as error:
            raise _at(place, error) from None
        if self.ignore_empty_think:
            spans = [_past_empty_think(found.text, start, end) for start, end in found.spans]
            return Rendered(found.text, spans, found.endless)
        return found


def _past_empty_think(text: str, start: int, end: int) -> tuple[int, int]:
    match = _EMPTY_THINK.match(text, start, end)
    return (match.end(), end) if match else (start, end)


class DocumentEncoder:
    """Texts, with the tokens that the tokenizer puts around them and its end token, all trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> None:
        self.source = source
        self.encode = TextEncoder(tokenizer)
        if tokenizer.eos_token_id is None:
            raise RecipeError("the tokenizer has no end token, with which a text must end")
        self.end = int(tokenizer.eos_token_id)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """Raises RecipeError naming the row that is broken. An empty text is one end token."""
        texts = []
        for place, row in rows:
            try:
                texts.append(shapes.text(row, self.source))
            except shapes.RowError as error:
                raise _at(place, error) from None
        tokens = []
        for encoding in self.encode(texts, add_special_tokens=True):
            ids = encoding.ids
            tokens.append(np.array(ids if ids[-1:] == [self.end] else [*ids, self.end], np.int32))
        trained = [np.ones(len(ids), dtype=np.uint8) for ids in tokens]
        return joined([place for place, _ in rows], tokens, trained, Counter())


class TokenEncoder:
    """Rows that are tokenised already."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """Raises RecipeError naming the row that is broken."""
        tokens, trained = [], []
        for place, row in rows:
            try:
                ids, mask = shapes.tokens(row)
            except shapes.RowError as error:
                raise _at(place, error) from None
            if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
                raise RecipeError(
                    f"{place} has tokens from {min(ids)} to {max(ids)}; the tokenizer has "
                    f"{self.vocabulary}"
                )
            tokens.append(np.array(ids, dtype=np.int32))
            trained.append(np.array(mask, dtype=np.uint8))
        return joined([place for place, _ in rows], tokens, trained, Counter())
