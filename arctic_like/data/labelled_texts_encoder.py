"""Texts with labels → tokens.

Columns of whole texts: `closing` (`pairs_of_texts_encoder`), and `classes_0`, `classes_1`, …: bit i of
column k says whether the text has label 62 · k + i. Labels of words are stored with the first token of each
word, as `TAG` times (1 + the label's number) added to the token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import shapes
from arctic_like.data.base import BadRow, Row, Sample, SourceConfig
from arctic_like.data.columns import RowError, kind, names, value_at
from arctic_like.data.encode import Encoded, joined
from arctic_like.data.encoders import bad_row
from arctic_like.data.labelled_texts import label_name
from arctic_like.data.masks import TextEncoder
from arctic_like.data.packing import IGNORED
from arctic_like.data.pairs_of_texts_encoder import closing_tokens
from arctic_like.data.pairs_of_texts_samples import WholeTexts
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BITS = 62
"""Labels in one column."""
TAG = 1 << 20
"""A token is smaller; a label's number is at most 2046."""


class _Encoder:
    """What both kinds of labels have in common. labels: all of them, in the order of their numbers."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig, labels: Sequence[str]
    ) -> None:
        self.source = source
        self.numbers = {label: number for number, label in enumerate(labels)}
        self.encode = TextEncoder(tokenizer)

    def _number(self, label: str) -> int:
        if label not in self.numbers:
            raise RowError(
                f"has the label {label!r}; the labels are {', '.join(map(repr, self.numbers))}"[
                    :400
                ],
                hint="state all labels in data.labels",
            )
        return self.numbers[label]

    def _read(
        self, rows: Sequence[Row], read: Callable[[dict[str, Any]], Any]
    ) -> tuple[list[tuple[str, Any]], list[BadRow]]:
        found, bad = [], []
        for place, row in rows:
            try:
                found.append((place, read(row)))
            except RowError as error:
                bad.append(bad_row(place, error))
        return found, bad


class LabelledTextEncoder(_Encoder):
    """Rows with a `text` and a `label`, or with `several` any number of `labels`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig, labels: Sequence[str], *,
        several: bool,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, source, labels)
        self.several = several

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """One document a row."""
        read, bad = self._read(rows, self._text_and_labels)
        encodings = self.encode([text for _, (text, _) in read], add_special_tokens=True)
        places, tokens, closing, labels = [], [], [], []
        for (place, (_, mine)), encoding in zip(read, encodings, strict=True):
            if not encoding.ids:
                bad.append(bad_row(place, RowError("has a text without a token")))
                continue
            places.append(place)
            tokens.append(np.array(encoding.ids, dtype=np.int32))
            closing.append(closing_tokens(encoding.special_tokens_mask))
            labels.append(mine)
        trained = [np.ones(len(one), dtype=np.uint8) for one in tokens]
        encoded = joined(places, tokens, trained, Counter())
        encoded.columns["closing"] = np.array(closing, dtype=np.int64)
        for column in range(-(-len(self.numbers) // BITS)):
            bits = [
                sum(1 << (one - column * BITS) for one in mine if one // BITS == column)
                for mine in labels
            ]
            encoded.columns[f"classes_{column}"] = np.array(bits, dtype=np.int64)
        encoded.bad += bad
        return encoded

    def _text_and_labels(self, row: dict[str, Any]) -> tuple[str, set[int]]:
        mapping = self.source.role_mapping
        if "text" in mapping:
            text = value_at(row, mapping["text"])
        elif self.source.column or "text" in row:
            text = shapes.text(row, self.source)
        else:
            raise RowError(f"has the columns {names(row)}; expected is `text`",
                           hint="name another column with `column`")  # fmt: skip
        if not isinstance(text, str):
            raise RowError(f"has {kind(text)} in 'text'; expected is text")
        labels = labels_of(row, self.source, several=self.several)
        return text, {self._number(label) for label in labels}


class TagEncoder(_Encoder):
    """Rows with `tokens`, a list of words, and as many `tags`. A word's label stands at its first token, as
    Devlin et al. 2019 (section 5.3) have it; other tokens have none."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig, labels: Sequence[str]
    ) -> None:
        super().__init__(tokenizer, source, labels)
        if len(tokenizer) > TAG or len(labels) > (1 << 11) - 2:
            raise RecipeError(
                Problem(
                    f"has {len(labels):,} labels over a vocabulary of {len(tokenizer):,}; at most 2,046 "
                    f"over {TAG:,} can be stored", place="data.labels",
                )
            )  # fmt: skip

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """One document a row."""
        read, bad = self._read(rows, self._words_and_numbers)
        encodings = self.encode._core.encode_batch(
            [words for _, (words, _) in read], is_pretokenized=True, add_special_tokens=True
        )
        places, tokens, closing, trained = [], [], [], []
        for (place, (_, numbers)), encoding in zip(read, encodings, strict=True):
            ids, labelled = (
                np.array(encoding.ids, dtype=np.int32),
                np.zeros(len(encoding.ids), "u1"),
            )
            word_ids = encoding.word_ids
            for at, word in enumerate(word_ids):
                if word is not None and (at == 0 or word_ids[at - 1] != word):
                    ids[at] += TAG * np.int32(numbers[word] + 1)
                    labelled[at] = 1
            if not labelled.any():
                bad.append(bad_row(place, RowError("has no word with a token")))
                continue
            places.append(place)
            tokens.append(ids)
            trained.append(labelled)
            closing.append(closing_tokens(encoding.special_tokens_mask))
        encoded = joined(places, tokens, trained, Counter())
        encoded.columns["closing"] = np.array(closing, dtype=np.int64)
        encoded.bad += bad
        return encoded

    def _words_and_numbers(self, row: dict[str, Any]) -> tuple[list[str], list[int]]:
        words, tags = tags_of(row, self.source)
        return words, [self._number(tag) for tag in tags]


def labels_of(row: dict[str, Any], source: SourceConfig, *, several: bool) -> list[str]:
    """The labels of a row: one, unless it may have several. Raises RowError."""
    name = _column(row, source, ("labels", "label") if several else ("label", "labels"))
    value = value_at(row, source.role_mapping.get(name, name))
    if several and not isinstance(value, list):
        raise RowError(f"has {kind(value)} in {name!r}; expected is a list of labels")
    return [_label(one, name) for one in (value if several else [value])]


def tags_of(row: dict[str, Any], source: SourceConfig) -> tuple[list[str], list[str]]:
    """The words of a row and the label of each. Raises RowError."""
    found = []
    for known in (("tokens", "words"), ("tags", "ner_tags", "labels")):
        name = _column(row, source, known)
        value = value_at(row, source.role_mapping.get(name, name))
        if not isinstance(value, list) or not value:
            raise RowError(f"has {kind(value)} in {name!r}; expected is a list")
        found.append((name, value))
    (name, words), (tagged, tags) = found
    if any(not isinstance(word, str) for word in words):
        raise RowError(f"has {kind(words)} in {name!r}; expected is a list of words")
    if len(words) != len(tags):
        raise RowError(f"has {len(words)} words and {len(tags)} tags; expected is one for each")
    return words, [_label(tag, tagged) for tag in tags]


def _column(row: dict[str, Any], source: SourceConfig, known: tuple[str, ...]) -> str:
    for name in known:
        if name in source.role_mapping or name in row:
            return name
    raise RowError(
        f"has the columns {names(row)}; expected is `{known[0]}`",
        hint=f"say which it is: `role_mapping: {{{known[0]}: …}}`",
    )


def _label(value: Any, name: str) -> str:
    try:
        return label_name(value)
    except ValueError:
        raise RowError(f"has {kind(value)} in {name!r}; expected is a label") from None


class LabelledSamples(WholeTexts):
    """Samples of one text; its `classes_…` stand at every token."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        (piece,) = self._bounds(index)
        part, document = self._where(piece)
        for name, column in part.columns.items():
            if name.startswith("classes_"):
                sample[name] = np.full(len(sample["input_ids"]), column[document], dtype=np.int64)
        return sample


class TagSamples(WholeTexts):
    """Samples of one text; `labels` are those of its words, at the first token of each."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        tags = sample["input_ids"] // TAG
        sample["labels"] = np.where(tags > 0, tags - 1, IGNORED)
        sample["input_ids"] %= TAG
        return sample
