"""Rows → tokens and masks, a batch at a time, in this process or in several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from multiprocessing import current_process
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data.base import BadRow, ReadRow, Row
from arctic_like.data.workers import in_processes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 1 << 20
"""What is under way at once takes some 150 bytes a token, most of it in the tokenizer's own form."""


@dataclass
class Encoded:
    """Documents of one batch of rows.

    places: where each comes from. lengths: int64, tokens of each. tokens: int32, trained: uint8, of
    all, flat. counts: what else is to be reported, by name. bad: rows that became no document.
    columns: further values, one a document (the label of an unpaired preference, say). rows: that
    were looked at. digests: uint64, xxh3 of each document's tokens. The last two are filled in
    behind the encoder.
    """

    places: list[str]
    lengths: NDArray[np.int64]
    tokens: NDArray[np.int32]
    trained: NDArray[np.uint8]
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)
    columns: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    rows: int = 0
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


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


def batched(rows: Iterable[ReadRow]) -> Iterator[list[ReadRow]]:
    """Rows in batches that are bounded in number and in characters."""
    batch: list[ReadRow] = []
    size = 0
    for place, row in rows:
        batch.append((place, row))
        size += _size(row)
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(
    rows: Iterable[ReadRow], encoder: Encoder, *, num_proc: int
) -> Generator[Encoded, None, None]:
    """The documents of all rows, in order, a batch at a time; with `num_proc` above 1 by that many
    processes, unless one batch is all there is. They end with the generator: close it.

    Only a few batches are under way at any time. What could not be read is listed in `bad` as well.
    """
    work = partial(encode_batch, encoder)
    batches = batched(rows)
    first = list(islice(batches, 2))
    batches = chain(first, batches)
    if num_proc == 1 or len(first) < 2 or current_process().daemon:  # which may have no children
        yield from map(work, batches)
        return
    yield from in_processes(work, batches, processes=num_proc)


def encode_batch(encoder: Encoder, batch: Sequence[ReadRow]) -> Encoded:
    """The documents of a batch, `bad` in the order of its rows."""
    found = encoder([(place, row) for place, row in batch if not isinstance(row, BadRow)])
    unread = [row for _, row in batch if isinstance(row, BadRow)]
    if unread:
        order = {place: number for number, (place, _) in enumerate(batch)}
        found.bad = sorted([*unread, *found.bad], key=lambda bad: order.get(bad.place, 0))
    found.rows = len(batch)
    found.digests = token_digests(found.tokens, found.lengths)
    return found


def token_digests(tokens: NDArray[np.int32], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """xxh3 (64 bits) of the tokens of each document, uint64. tokens: of all, flat."""
    import xxhash

    digest = xxhash.xxh3_64_intdigest
    content = memoryview(tokens.astype("<i4").tobytes())
    borders = np.concatenate([[0], np.cumsum(lengths) * 4]).tolist()
    found = (digest(content[start:stop]) for start, stop in pairwise(borders))
    return np.fromiter(found, dtype=np.uint64, count=len(lengths))
