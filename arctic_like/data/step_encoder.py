"""Solutions in steps → tokens, and where a step ends.

A row has a `prompt`, its steps as `completions` and their marks as `labels`. The document is the prompt, then
every step with the separator behind it. Each part is tokenised by itself, so that a step's end is a token's
end; a step's label stands at its last token, which is the separator's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import shapes
from arctic_like.data.base import BadRow, Row, Sample, SourceConfig
from arctic_like.data.encode import Encoded, joined
from arctic_like.data.encoders import bad_row
from arctic_like.data.masks import TextEncoder
from arctic_like.data.packing import IGNORED
from arctic_like.data.samples import DocumentSamples

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from arctic_like.data.rendering import Renderer

RIGHT = 1 << 30
"""Added to a stored token at which a right step ends; no vocabulary reaches it."""


class StepEncoder:
    """Rows with a prompt, steps and their marks: one document each."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig, *, separator: str,
        last_only: bool,
    ) -> None:  # fmt: skip
        self.source = source
        self.last_only = last_only
        self.tokenizer = tokenizer
        self.encode = TextEncoder(tokenizer)
        self._renderer: Renderer | None = None
        self.separator = self._ids([separator])[0]

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        """One document a row."""
        places, tokens, trained = [], [], []
        bad: list[BadRow] = []
        for place, row in rows:
            try:
                ids, ends = self._read(row)
            except shapes.RowError as error:
                bad.append(bad_row(place, error))
                continue
            places.append(place)
            tokens.append(ids)
            trained.append(ends)
        encoded = joined(places, tokens, trained, Counter())
        encoded.bad += bad
        return encoded

    def _read(self, row: dict[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(tokens, 1 where a judged step ends)."""
        found = shapes.stepwise(row, self.source)
        prompt, *steps = self._ids([self._prompt(found.prompt), *found.steps])
        if isinstance(found.prompt, str) and self.tokenizer.bos_token_id is not None:
            prompt = [int(self.tokenizer.bos_token_id), *prompt]
        if not prompt:
            raise shapes.RowError("has a prompt without a token; nothing would judge its steps")
        parts = [prompt, *(step + self.separator for step in steps)]
        ends = np.cumsum([len(part) for part in parts])[1:] - 1
        ids = np.array([token for part in parts for token in part], dtype=np.int32)
        judged = slice(-1, None) if self.last_only else slice(None)
        trained = np.zeros(len(ids), dtype=np.uint8)
        trained[ends[judged]] = 1
        ids[ends[judged]] += RIGHT * np.array(found.labels[judged], dtype=np.int32)
        return ids, trained

    def _prompt(self, prompt: str | list[shapes.Message]) -> str:
        if isinstance(prompt, str):
            return prompt
        from arctic_like.data.rendering import Renderer

        if self._renderer is None:
            self._renderer = Renderer(self.tokenizer)
        return self._renderer(prompt, generation=True)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(found.ids) for found in self.encode(texts, add_special_tokens=False)]


class StepSamples(DocumentSamples):
    """Samples whose labels are the marks of steps, 1 or 0, at their last tokens."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        labelled = sample["labels"] != IGNORED
        marks = (sample["input_ids"] >= RIGHT).astype(np.int64)
        sample["labels"] = np.where(labelled, marks, IGNORED)
        sample["input_ids"] -= RIGHT * marks
        return sample
