"""Rows → tokens and masks, a batch at a time, in this process or in several."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data.base import BadRow, ReadRow, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH_ROWS = 1024
_BATCH_CHARACTERS = 1 << 22


@dataclass
class Encoded:
    """Documents of one batch of rows.

    places: where each comes from. lengths: int64, tokens of each. tokens: int32, trained: uint8, of
    all, flat. counts: what else is to be reported, by name. bad: rows that became no document.
    columns: further values, one a document (the label of an unpaired preference, say).
    """

    places: list[str]
    lengths: NDArray[np.int64]
    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)
    columns: dict[str, NDArray[np.int64]] = field(default_factory=dict)


Encoder = Callable[[Sequence[Row]], Encoded]


def joined(
    places: list[str],
    tokens: list[NDArray[np.int32]],
    trained: list[NDArray[np.uint8]],
    counts: Counter[str],
) -> Encoded:
    """Documents that stand one by one, as one batch."""
    lengths = np.array([len(part) for part in tokens], dtype=np.int64)
    none = np.zeros(0, dtype=np.int32)
    return Encoded(
        places,
        lengths,
        np.concatenate([none, *tokens]),
        np.concatenate([none.astype(np.uint8), *trained]),
        counts,
    )


def _size(value: Any) -> int:
    """Roughly the characters in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value)) if value and not isinstance(value[0], int) else len(value)
    return 1


def batched(rows: Iterable[ReadRow]) -> Iterator[list[Row]]:
    """Rows in batches that are bounded in number and in characters."""
    batch: list[Row] = []
    size = 0
    for place, row in rows:
        if isinstance(row, BadRow):
            raise row.error()
        batch.append((place, row))
        size += _size(row)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(rows: Iterable[ReadRow], encoder: Encoder, *, num_proc: int) -> Iterator[Encoded]:
    """The documents of all rows, in order; with `num_proc` above 1 by that many processes.

    Only a few batches are under way at any time.
    """
    if num_proc == 1:
        yield from map(encoder, batched(rows))
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing import get_context

    # forked, so that the tokenizer need not be read again by each
    with ProcessPoolExecutor(
        num_proc, mp_context=get_context("fork"), initializer=_start, initargs=(encoder,)
    ) as pool:
        waiting: deque[Future[Encoded]] = deque()
        for batch in batched(rows):
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_encoder: Encoder | None = None


def _start(encoder: Encoder) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _encode(rows: list[Row]) -> Encoded:
    assert _encoder is not None
    return _encoder(rows)
