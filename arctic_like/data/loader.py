"""Batches in the order of a plan, from any position on, made by any number of worker processes.

The state of a loader is a position, which the trainer keeps; nothing is replayed. The global random
generators are left alone: torch's DataLoader draws its base seed from a generator of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from arctic_like.data.order import GlobalBatch, Plan, split
from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.data.base import Sample, SampleSet

Collate = Callable[[list["Sample"]], "dict[str, Tensor]"]


@dataclass(frozen=True)
class MicroBatch:
    """One forward's batch on this rank.

    data: name → (micro_batch, length) int64. samples: indices in the set, a row each. idle: stands
    in where this rank has nothing to do (its rows are another rank's, to be weighted with 0).
    """

    data: dict[str, Tensor]
    samples: list[int]
    idle: bool = False


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: the global batch, and this rank's micro-batches of it."""

    global_batch: GlobalBatch
    micro_batches: list[MicroBatch]


class _Fetch:
    """What runs in a worker: a list of sample indices → the collated batch."""

    def __init__(self, samples: SampleSet, collate: Collate) -> None:
        self.samples = samples
        self.collate = collate

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        rows = []
        for index in indices:
            try:
                rows.append(self.samples[index])
            except Exception as error:
                raise RunError(
                    f"sample {index} ({self.samples.sample_id(index)}) cannot be read: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return self.collate(rows)


def _same(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _fetched(
    fetch: _Fetch, lists: Iterable[list[int]], *, num_workers: int, pin_memory: bool
) -> Iterator[dict[str, Tensor]]:
    """The batch of each list of indices, in order. Workers run ahead by two lists each."""
    if not num_workers:
        # torch's DataLoader would add a quarter to the time of a batch that is only copied.
        for indices in lists:
            batch = fetch[indices]
            yield {k: v.pin_memory() for k, v in batch.items()} if pin_memory else batch
        return
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        cast("Any", fetch),
        sampler=cast("Any", lists),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=cast("Any", _same),
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    yield from loader


@dataclass(frozen=True)
class Loader:
    """The training batches of one rank.

    samples, collate: as a DataFactory prepared them. plan: which samples belong to which step.
    """

    samples: SampleSet
    collate: Collate
    plan: Plan
    micro_batch_size: int
    rank: int = 0
    size: int = 1
    num_workers: int = 0
    pin_memory: bool = False

    def steps(self, position: int = 0) -> Iterator[StepBatch]:
        """Step after step from `position` on, without end. Starts in constant time.

        The workers end when the iterator is closed or collected.
        """
        planned: deque[tuple[GlobalBatch, list[list[int]]]] = deque()

        def lists() -> Iterator[list[int]]:
            here = position
            while True:
                batch = self.plan.at(here)
                micro = split(
                    batch.samples,
                    micro_batch_size=self.micro_batch_size,
                    rank=self.rank,
                    size=self.size,
                )
                planned.append((batch, micro))
                stand_in = [int(batch.samples[0])]
                yield from (rows or stand_in for rows in micro)
                here = batch.next_position

        fetch = _Fetch(self.samples, self.collate)
        batches = _fetched(fetch, lists(), num_workers=self.num_workers, pin_memory=self.pin_memory)
        while True:
            first = next(batches)
            batch, micro = planned.popleft()
            data = [first, *(next(batches) for _ in micro[1:])]
            yield StepBatch(batch, _micro_batches(data, micro, stand_in=int(batch.samples[0])))


def _micro_batches(
    data: Sequence[dict[str, Tensor]], micro: list[list[int]], *, stand_in: int
) -> list[MicroBatch]:
    return [
        MicroBatch(tensors, rows or [stand_in], idle=not rows)
        for tensors, rows in zip(data, micro, strict=True)
    ]


def evaluation_batches(
    samples: SampleSet,
    collate: Collate,
    *,
    micro_batch_size: int,
    rank: int = 0,
    size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """The whole set in its order, each sample once over all ranks.

    Every rank gets the same number of micro-batches, so that all take part in each forward (ZeRO-3
    gathers weights there); those that are `idle` count nothing.
    """
    if not len(samples):
        return
    micro = split(range(len(samples)), micro_batch_size=micro_batch_size, rank=rank, size=size)
    lists = [rows or [0] for rows in micro]
    fetch = _Fetch(samples, collate)
    batches = _fetched(fetch, lists, num_workers=num_workers, pin_memory=pin_memory)
    for data, rows in zip(batches, micro, strict=True):
        yield MicroBatch(data, rows or [0], idle=not rows)
