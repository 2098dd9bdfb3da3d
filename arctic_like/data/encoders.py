"""Rows → tokens and masks: conversations, texts, rows that are tokenised already.

A row that cannot be used is never an error here: it is listed in `Encoded.bad`. Encoders are
picklable, and the same rows give the same tokens in any process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import shapes
from arctic_like.data.base import BadRow, DataConfig, Row, SourceConfig, TrainOn
from arctic_like.data.encode import Encoded, joined
from arctic_like.data.masks import TextEncoder, token_mask
from arctic_like.data.templates import ChatTemplate, Rendered
from arctic_like.data.thinking import past_empty_block, without_thoughts
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class MaskRules:
    """What of a conversation is trained: the recipe's settings of the same names."""

    train_on: TrainOn = "assistant"
    train_end_of_turn: bool = True
    thinking: str = "keep"
    ignore_empty_think: bool = False

    @classmethod
    def of(cls, config: DataConfig, source: SourceConfig) -> MaskRules:
        """The rules for a source, whose own `train_on` goes before."""
        return cls(
            train_on=source.train_on or config.trained_turns,
            train_end_of_turn=config.train_end_of_turn,
            thinking=config.thinking,
            ignore_empty_think=config.ignore_empty_think,
        )

    def key(self) -> dict[str, Any]:
        """What a cache key needs to know of them."""
        return asdict(self)


class ConversationEncoder:
    """Renders conversations with the chat template and trains what the rules say."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig, rules: MaskRules
    ) -> None:
        self.source = source
        self.rules = rules
        self.template = ChatTemplate(tokenizer)
        self.encode = TextEncoder(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """One document a row."""
        rendered: list[tuple[str, Rendered]] = []
        bad: list[BadRow] = []
        for place, row in rows:
            try:
                rendered.append((place, self.render(row)))
            except shapes.RowError as error:
                bad.append(bad_row(place, error))
        encodings = self.encode([one.text for _, one in rendered], add_special_tokens=False)
        counts: Counter[str] = Counter()
        places, tokens, trained = [], [], []
        for (place, one), encoding in zip(rendered, encodings, strict=True):
            try:
                mask = token_mask(encoding, one.spans)
            except ValueError as error:
                bad.append(BadRow(place, f"cannot be masked exactly: {error}"))
                continue
            places.append(place)
            tokens.append(np.array(encoding.ids, dtype=np.int32))
            trained.append(mask.trained)
            counts["straddling"] += mask.straddling
            counts["endless"] += one.endless
        return _finished(places, tokens, trained, counts, bad)

    def render(self, row: dict[str, Any]) -> Rendered:
        """A row's conversation as text, with what is trained of it. Raises RowError."""
        messages = shapes.conversation(row, self.source)
        if self.rules.train_on == "all" and not _says_what_is_trained(row):
            # a prompt is context by its shape, not by its author's word
            messages = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        return render(self.template, messages, shapes.tools(row), self.rules)


def render(
    template: ChatTemplate,
    messages: Sequence[shapes.Message],
    tools: list[Any] | None,
    rules: MaskRules,
) -> Rendered:
    """A conversation as text, with what the rules train of it. Raises RowError."""
    if rules.thinking == "drop":
        messages = without_thoughts(messages)
    found = template.trained(
        messages, tools=tools, train_on=rules.train_on, end_of_turn=rules.train_end_of_turn
    )
    return past_empty_thoughts(found) if rules.ignore_empty_think else found


def past_empty_thoughts(found: Rendered) -> Rendered:
    """Without the empty `<think></think>` that spans begin with."""
    spans = [(past_empty_block(found.text, start, end), end) for start, end in found.spans]
    return Rendered(
        found.text, [(start, end) for start, end in spans if start < end], found.endless
    )


class DocumentEncoder:
    """Texts, with the tokens that the tokenizer puts around them and its end token, all trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> None:
        self.source = source
        self.encode = TextEncoder(tokenizer)
        if tokenizer.eos_token_id is None:
            raise RecipeError(
                Problem(
                    "has no end token, with which a text must end",
                    place="tokenizer",
                    hint="name a tokenizer that has an eos_token",
                )
            )
        self.end = int(tokenizer.eos_token_id)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """One document a row. An empty text is one end token."""
        places, texts = [], []
        bad: list[BadRow] = []
        for place, row in rows:
            try:
                texts.append(shapes.text(row, self.source))
                places.append(place)
            except shapes.RowError as error:
                bad.append(bad_row(place, error))
        tokens = []
        for encoding in self.encode(texts, add_special_tokens=True):
            ids = encoding.ids
            tokens.append(np.array(ids if ids[-1:] == [self.end] else [*ids, self.end], np.int32))
        trained = [np.ones(len(ids), dtype=np.uint8) for ids in tokens]
        return _finished(places, tokens, trained, Counter(), bad)


class TokenEncoder:
    """Rows that are tokenised already."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """One document a row."""
        places, tokens, trained = [], [], []
        bad: list[BadRow] = []
        for place, row in rows:
            try:
                ids, mask = self._read(row)
            except shapes.RowError as error:
                bad.append(bad_row(place, error))
                continue
            places.append(place)
            tokens.append(np.array(ids, dtype=np.int32))
            trained.append(np.array(mask, dtype=np.uint8))
        return _finished(places, tokens, trained, Counter(), bad)

    def _read(self, row: dict[str, Any]) -> tuple[Sequence[int], Sequence[bool]]:
        ids, mask = shapes.tokens(row)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise shapes.RowError(
                f"has tokens from {min(ids)} to {max(ids)}; the tokenizer has {self.vocabulary}",
                hint="name the tokenizer that the rows were made with",
            )
        return ids, mask


def bad_row(place: str, error: shapes.RowError) -> BadRow:
    """A row's error, with its place."""
    return BadRow(place, str(error), error.hint)


def _says_what_is_trained(row: dict[str, Any]) -> bool:
    """Whether a message of the row states it, as `train` or OpenAI's `weight`."""
    turns: Iterable[Any] = (
        turn for value in row.values() if isinstance(value, list) for turn in value
    )
    return any(isinstance(turn, dict) and turn.keys() & {"train", "weight"} for turn in turns)


def _finished(
    places: list[str],
    tokens: list[NDArray[np.int32]],
    trained: list[NDArray[np.uint8]],
    counts: Counter[str],
    bad: list[BadRow],
) -> Encoded:
    encoded = joined(places, tokens, trained, counts)
    encoded.bad += bad
    return encoded
