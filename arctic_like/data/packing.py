"""Documents into samples: which go together, and where long ones are cut. Pure arithmetic on
lengths.

A *piece* is a stretch of one document that stands in one sample as a document of its own: the whole
document, unless it was cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORED = -100
"""The label of what is not trained, as torch's cross entropy has it."""


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents; int64 arrays of one length.

    document: which. start, length: in tokens, from the document's first.
    """

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)

    def take(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Pieces:
        """Some of the pieces, by index or by mask."""
        return Pieces(self.document[chosen], self.start[chosen], self.length[chosen])


def whole(lengths: NDArray[np.int64], documents: NDArray[np.int64]) -> Pieces:
    """One piece for each of `documents`, uncut; `lengths` are those of all documents."""
    return Pieces(documents, np.zeros_like(documents), lengths[documents])


def joined(parts: Sequence[Pieces]) -> Pieces:
    """Pieces, one after another; at least one part."""
    return Pieces(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
    )


def repeated(pieces: Pieces, *, capacity: int, exactly: bool = False) -> Pieces:
    """Pieces that together do not fill one pack, repeated in their order until the next one would not
    fit any more; `exactly`: until it is full, the last one cut. Others as they are."""
    total = int(pieces.length.sum())
    if not 0 < total < capacity:
        return pieces
    count = len(pieces)
    often = np.resize(np.arange(count), count * -(-capacity // total))
    ends = np.cumsum(pieces.length[often])
    if not exactly:
        return pieces.take(often[ends <= capacity])
    many = pieces.take(often[: int(np.searchsorted(ends, capacity)) + 1])
    many.length[-1] -= int(many.length.sum()) - capacity
    return many


def cut(pieces: Pieces, *, max_length: int, keep: str) -> Pieces:
    """Bring long pieces down to `max_length`: `keep` their "start" or "end", or "drop" them, or
    "split" them into consecutive pieces, the last of which is shorter."""
    long = pieces.length > max_length
    if keep == "drop":
        return pieces.take(~long)
    if keep == "split":
        parts = -(-pieces.length // max_length)
        nth = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
        start = nth * max_length
        rest = np.repeat(pieces.length, parts) - start
        return Pieces(
            np.repeat(pieces.document, parts),
            np.repeat(pieces.start, parts) + start,
            np.minimum(rest, max_length),
        )
    length = np.minimum(pieces.length, max_length)
    start = pieces.start + (pieces.length - length if keep == "end" else 0)
    return Pieces(pieces.document, start, length)


def best_fit(lengths: NDArray[np.int64], *, capacity: int) -> NDArray[np.int64]:
    """Best-fit decreasing: the pack of each document, int64, packs numbered as they were opened.

    Longest first (ties by index), each into the open pack that it fills best, over the whole set.
    All documents of one length are placed together, since a pack that takes one stays the best fit
    for the next: O(n log n), about a second for a million. Raises ValueError for a length outside
    1..capacity.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie in 1..{capacity}")
    pack_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[order])) + 1
    open_packs: dict[int, list[int]] = {}  # room left → packs
    rooms: list[int] = []  # the keys of open_packs, sorted
    count = 0
    for group in np.split(order, borders):
        if not len(group):
            continue
        length = int(lengths[group[0]])
        placed, total = 0, len(group)
        while placed < total:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                fits = room // length
                wanted = -(-(total - placed) // fits)
                packs, left = open_packs[room][:wanted], open_packs[room][wanted:]
                if left:
                    open_packs[room] = left
                else:
                    del open_packs[room], rooms[at]
            else:
                room, fits = capacity, capacity // length
                wanted = -(-(total - placed) // fits)
                packs = list(range(count, count + wanted))
                count += wanted
            taken = min(fits * len(packs), total - placed)
            pack_of[group[placed : placed + taken]] = np.repeat(packs, fits)[:taken]
            placed += taken
            in_last = taken - fits * (len(packs) - 1)
            for some, used in ((packs[:-1], fits), (packs[-1:], in_last)):
                rest = room - used * length
                if not some or not rest:
                    continue
                if rest in open_packs:
                    open_packs[rest].extend(some)
                else:
                    open_packs[rest] = list(some)
                    insort(rooms, rest)
    return pack_of


def grouped(pack_of: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(order, offsets): pack p holds `order[offsets[p]:offsets[p + 1]]`, in the documents'
    order."""
    order = np.argsort(pack_of, kind="stable")
    counts = np.bincount(pack_of) if len(pack_of) else np.zeros(0, dtype=np.int64)
    return order, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def end_to_end(pieces: Pieces, *, capacity: int) -> tuple[Pieces, NDArray[np.int64]]:
    """(pieces, offsets): laid end to end in their order and cut so that every sample but the last
    has exactly `capacity` tokens; sample s holds the pieces `offsets[s]:offsets[s + 1]`."""
    ends = np.cumsum(pieces.length)
    begins = ends - pieces.length
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(begins, np.arange(0, total, capacity))
    owner = np.searchsorted(ends, cuts, side="right")
    length = np.diff(np.append(cuts, total))
    start = pieces.start[owner] + cuts - begins[owner]
    offsets = np.searchsorted(cuts, np.arange(0, total, capacity))
    laid = Pieces(pieces.document[owner], start, length)
    return laid, np.append(offsets, len(cuts)).astype(np.int64)
