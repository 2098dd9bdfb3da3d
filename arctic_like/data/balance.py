"""A global batch into micro-batches and ranks: who computes what, by length.

The global batch is decided before; nothing here changes a loss or a gradient but by rounding. Pure
functions, so every rank finds the same division by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data.order import split

if TYPE_CHECKING:
    from numpy.typing import NDArray

Share = list[list[int]]
"""The micro-batches of one rank, each some samples; an empty one is idle."""


@dataclass(frozen=True)
class Division:
    """How global batches are divided.

    micro_batch_size: most rows of a micro-batch. max_tokens: most tokens of one, padding included,
    in place of a number of rows; a longer sample is a micro-batch by itself. balance: like lengths
    come together, and no rank has more to do than the others in the same round.
    """

    micro_batch_size: int
    max_tokens: int | None = None
    balance: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError("a micro-batch holds at least one sample, or one token")

    @property
    def by_length(self) -> bool:
        """Whether lengths matter to it."""
        return self.balance or self.max_tokens is not None

    def shares(
        self, samples: Sequence[int] | NDArray[np.int64], lengths: NDArray[np.int64] | None, *,
        ranks: int,
    ) -> list[Share]:  # fmt: skip
        """The share of each rank; all have the same number of micro-batches.

        lengths: tokens of each of `samples` as they will be padded alone; None where unknown, when
        the samples are divided in their order by number.
        """
        listed = [int(sample) for sample in samples]
        if lengths is None or not listed or not self.by_length:
            rows = self.micro_batch_size
            return [
                split(listed, micro_batch_size=rows, rank=rank, size=ranks) for rank in range(ranks)
            ]
        if not self.balance:
            assert self.max_tokens is not None
            counts = _in_order(lengths.tolist(), budget=self.max_tokens)
            return _dealt(_cut(listed, counts), ranks=ranks)
        order = np.argsort(-lengths, kind="stable")
        longest_first = lengths[order].tolist()
        counts = self._balanced(longest_first, ranks=ranks)
        chunks = _cut([listed[place] for place in order], counts)
        firsts = np.cumsum([0, *counts[:-1]])
        work = [longest_first[first] * count for first, count in zip(firsts, counts, strict=True)]
        return _dealt(chunks, ranks=ranks, work=work)

    def _balanced(self, lengths: list[int], *, ranks: int) -> list[int]:
        """Rows of each chunk of samples that stand longest first: as few rounds as there must be,
        and in them the lowest largest chunk, in padded tokens, that can be had."""
        if self.max_tokens is None:
            rows, most = self.micro_batch_size, lengths[0] * self.micro_batch_size
            needed = -(-len(lengths) // rows)
        else:
            rows, most = len(lengths), self.max_tokens
            needed = len(_filled(lengths, rows=rows, budget=most))
        room = -(-needed // ranks) * ranks
        low, high = 0, most
        while high - low > 1:  # the number of chunks falls as the budget grows
            middle = (low + high) // 2
            if len(_filled(lengths, rows=rows, budget=middle)) <= room:
                high = middle
            else:
                low = middle
        return _filled(lengths, rows=rows, budget=high)


def _filled(lengths: list[int], *, rows: int, budget: int) -> list[int]:
    """Rows of each chunk of samples that stand longest first, each as full as `rows` and a budget of
    padded tokens allow. A step a chunk, not a sample."""
    counts, at = [], 0
    while at < len(lengths):
        count = min(rows, max(1, budget // max(lengths[at], 1)), len(lengths) - at)
        counts.append(count)
        at += count
    return counts


def _in_order(lengths: list[int], *, budget: int) -> list[int]:
    """Rows of each chunk of samples in their order, within a budget of padded tokens."""
    counts: list[int] = []
    longest = 0
    for length in lengths:
        longest = max(longest, length)
        if counts and longest * (counts[-1] + 1) <= budget:
            counts[-1] += 1
        else:
            counts.append(1)
            longest = length
    return counts


def _cut(samples: list[int], counts: list[int]) -> list[list[int]]:
    ends = np.cumsum(counts).tolist()
    return [samples[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _dealt(chunks: list[list[int]], *, ranks: int, work: list[int] | None = None) -> list[Share]:
    """Chunks in rounds, one to each rank; what is missing in the last round is idle.

    work: of each chunk. With it a round has chunks of like work, as ranks may wait for each other in
    every round, and the heaviest goes to the rank that had the least so far.
    """
    order = list(range(len(chunks)))
    if work is not None:
        order.sort(key=lambda chunk: -work[chunk])
    shares: list[Share] = [[] for _ in range(ranks)]
    done = [0] * ranks
    for start in range(0, len(order), ranks):
        turn = sorted(range(ranks), key=lambda rank: done[rank]) if work else range(ranks)
        for place, rank in enumerate(turn):
            chunk = order[start + place] if start + place < len(order) else None
            shares[rank].append([] if chunk is None else chunks[chunk])
            if work and chunk is not None:
                done[rank] += work[chunk]
    return shares


def division_of(config: Any, micro_batch_size: int) -> Division:
    """What a recipe's `data:` says of it; a data config without these keys says nothing."""
    return Division(
        micro_batch_size,
        max_tokens=getattr(config, "max_tokens_per_batch", None),
        balance=bool(getattr(config, "balance", False)),
    )
