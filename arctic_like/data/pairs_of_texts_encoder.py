"""Rows with texts that belong together → tokens: each text is a document of its own.

A row has an `anchor` (or `query`), a `positive`, and may have a `negative` or `negatives`. Its documents
follow each other in that order, with the special tokens that the tokenizer puts around a text.

Columns (one value a document): `role`, 0 for anchors, 1 for positives, 2 for negatives; `closing`, how many
special tokens stand at its end, which a cut text keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data.base import BadRow, Row, SourceConfig
from arctic_like.data.columns import RowError, kind, names, value_at
from arctic_like.data.encode import Encoded, joined
from arctic_like.data.encoders import bad_row
from arctic_like.data.masks import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHOR, POSITIVE, NEGATIVE = range(3)
"""The values of `role`."""


class UnitEncoder:
    """Rows with an anchor, its positive and up to `negatives` hard negatives."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig, *, query_prefix: str = "",
        passage_prefix: str = "", negatives: int = 0,
    ) -> None:  # fmt: skip
        self.source = source
        self.query_prefix, self.passage_prefix = query_prefix, passage_prefix
        self.negatives = negatives
        self.encode = TextEncoder(tokenizer)

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """As many documents a row as it has texts."""
        read: list[tuple[str, list[str]]] = []
        bad: list[BadRow] = []
        for place, row in rows:
            try:
                read.append((place, self._texts(row)))
            except RowError as error:
                bad.append(bad_row(place, error))
        found = iter(
            self.encode([text for _, texts in read for text in texts], add_special_tokens=True)
        )
        places, tokens, roles, closing = [], [], [], []
        for place, texts in read:
            mine = [next(found) for _ in texts]
            if any(not one.ids for one in mine):
                bad.append(bad_row(place, RowError("has a text without a token")))
                continue
            places += [place] * len(mine)
            tokens += [np.array(one.ids, dtype=np.int32) for one in mine]
            roles += [min(number, NEGATIVE) for number in range(len(mine))]
            closing += [closing_tokens(one.special_tokens_mask) for one in mine]
        trained = [np.ones(len(one), dtype=np.uint8) for one in tokens]
        encoded = joined(places, tokens, trained, Counter())
        encoded.columns["role"] = np.array(roles, dtype=np.int64)
        encoded.columns["closing"] = np.array(closing, dtype=np.int64)
        encoded.bad += bad
        return encoded

    def _texts(self, row: dict[str, Any]) -> list[str]:
        """Anchor, positive, negatives, with their prefixes."""
        mapping = self.source.role_mapping
        anchor = next((n for n in ("anchor", "query") if n in mapping or n in row), None)
        if anchor is None or not ("positive" in mapping or "positive" in row):
            raise RowError(
                f"has the columns {names(row)}; expected is `anchor` (or `query`) and `positive`",
                hint="say which they are: `role_mapping: {anchor: …, positive: …}`",
            )
        first, positive = (self._text(row, name) for name in (anchor, "positive"))
        negatives = self._negatives(row)
        passages = [self.passage_prefix + text for text in (positive, *negatives)]
        return [self.query_prefix + first, *passages]

    def _negatives(self, row: dict[str, Any]) -> list[str]:
        name = next(
            (n for n in ("negatives", "negative") if n in self.source.role_mapping or n in row), ""
        )
        if not name:
            return []
        value = value_at(row, self.source.role_mapping.get(name, name))
        listed = [] if value is None else value if isinstance(value, list) else [value]
        for one in listed:
            _checked(one, name)
        if len(listed) > self.negatives:
            raise RowError(
                f"has {len(listed)} hard negatives, more than data.negatives ({self.negatives})",
                hint=f"set data.negatives to the most that a row has, {len(listed)} or more",
            )
        return listed

    def _text(self, row: dict[str, Any], name: str) -> str:
        return _checked(value_at(row, self.source.role_mapping.get(name, name)), name)


def closing_tokens(special: Sequence[int]) -> int:
    """How many special tokens a text ends with; not all of them where it has no other."""
    return next((count for count, one in enumerate(reversed(special)) if not one), 0)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"has {kind(value)} in {name!r}; expected is text")
    return value
