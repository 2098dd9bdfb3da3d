"""Batches in the order of a plan, from any position on, made by any number of worker processes.

The state of a loader is a position, which the trainer keeps; nothing is replayed. The global random
generators are left alone: torch's DataLoader draws its base seed from a generator of its own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from arctic_like.data.balance import Division
from arctic_like.data.order import GlobalBatch, Plan
from arctic_like.errors import ArcticError, RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from arctic_like.data.base import Sample, SampleSet

T = TypeVar("T")
_PATIENCE = 5.0
"""Seconds that the end of a loader waits for its thread, which may be waiting for data."""

_BEHIND = 4
"""Steps by which a rank may be behind another: one, and what a thread of each runs ahead."""

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


@dataclass(frozen=True)
class _Unread:
    """In the place of a batch that could not be made: why. An error that is raised in a worker would
    arrive with that worker's traceback as its text."""

    message: str


class _Fetch:
    """What runs in a worker: a list of samples → the collated batch."""

    def __init__(self, samples: SampleSet, collate: Collate) -> None:
        self.samples = samples
        self.collate = collate

    def __getitem__(self, keys: list[Any]) -> Any:
        rows = []
        for key in keys:
            try:
                rows.append(self.samples[key])
            except Exception as error:
                name = self.samples.sample_id(key)
                return _Unread(
                    f"sample {key} ({name}) cannot be read: {type(error).__name__}: {error}"
                )
        return self.collate(rows)


def _same(batch: Any) -> Any:
    return batch


def _fetched(
    fetch: _Fetch, lists: Iterable[list[Any]], *, num_workers: int, pin_memory: bool
) -> Iterator[Any]:
    """The batch of each list of samples, in order. Workers run ahead by two lists each."""
    if not num_workers:
        # torch's DataLoader would add a quarter to the time of a batch that is only copied.
        for keys in lists:
            batch = _read(fetch[keys])
            yield _pinned(batch) if pin_memory else batch
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
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error) or isinstance(error, ArcticError):
                raise
            raise RunError(
                f"a worker that puts batches together is gone: {error}\n"
                "    the system ends processes that take too much memory; lower "
                "data.dl_num_workers, or set it to 0"
            ) from error
        yield _read(batch)


def _read(batch: Any) -> Any:
    if isinstance(batch, _Unread):
        raise RunError(batch.message)
    return batch


def _pinned(batch: Any) -> Any:
    """Nested tensors in page-locked memory, from which a device copies while it computes."""
    from torch.utils.data._utils.pin_memory import pin_memory

    return pin_memory(batch)  # type: ignore[no-untyped-call]


def _ahead(batches: Generator[T], *, depth: int, prepare: Callable[[], None]) -> Iterator[T]:
    """The same, made by a thread that runs ahead by `depth`: the device need not wait for the host.

    prepare: called in the thread first. The thread ends when the iterator is closed or collected.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    over = threading.Event()

    def give(item: tuple[T | None, BaseException | None]) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            prepare()
            for batch in batches:
                give((batch, None))
                if over.is_set():
                    return
            give((None, StopIteration()))
        except BaseException as error:
            give((None, error))
        finally:
            batches.close()

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield cast("T", batch)
    finally:
        over.set()
        thread.join(_PATIENCE)


@dataclass(frozen=True)
class Loader:
    """The training batches of one rank.

    samples, collate: as a DataFactory prepared them. plan: which samples belong to which step.
    division: how a global batch is cut into micro-batches and ranks, which changes nothing else.
    """

    samples: SampleSet
    collate: Collate
    plan: Plan
    division: Division
    rank: int = 0
    size: int = 1
    num_workers: int = 0
    pin_memory: bool = False

    def steps(self, position: int = 0) -> Iterator[StepBatch]:
        """Step after step from `position` on, without end. Starts in constant time.

        The workers end when the iterator is closed or collected.
        """
        steps = self._steps(position)
        return _pinned_ahead(steps) if self.pin_memory else steps

    def _steps(self, position: int) -> Generator[StepBatch]:
        planned: deque[tuple[GlobalBatch, list[list[int]], int]] = deque()

        def lists() -> Iterator[list[Any]]:
            here = position
            while True:
                batch = self.plan.at(here)
                share, stand_in = divided(
                    batch.samples, self.samples, self.collate, self.division,
                    rank=self.rank, size=self.size,
                )  # fmt: skip
                planned.append((batch, share, stand_in))
                for rows in share:
                    yield _located(self.samples, rows or [stand_in])
                here = batch.next_position

        fetch = _Fetch(self.samples, self.collate)
        batches = _fetched(fetch, lists(), num_workers=self.num_workers, pin_memory=self.pin_memory)
        while True:
            first = next(batches)
            batch, share, stand_in = planned.popleft()
            data = [first, *(next(batches) for _ in share[1:])]
            if hasattr(self.samples, "release"):  # other ranks may be a few steps behind
                self.samples.release(batch.position - _BEHIND * len(batch.samples))
            yield StepBatch(batch, _micro_batches(data, share, stand_in))

    def step_of(self, samples: NDArray[np.int64], *, rounds: int | None = None) -> StepBatch:
        """Some samples as if they were the first global batch, made at once. rounds: how many of this rank's
        micro-batches, the largest first where they are balanced; None: all."""
        share, stand_in = divided(
            samples, self.samples, self.collate, self.division, rank=self.rank, size=self.size
        )
        fetch = _Fetch(self.samples, self.collate)
        data = [_read(fetch[_located(self.samples, rows or [stand_in])]) for rows in share[:rounds]]
        micro_batches = _micro_batches(data, share[:rounds], stand_in)
        return StepBatch(GlobalBatch(0, 0, samples), micro_batches)

    def state(self, position: int) -> dict[str, Any]:
        """What a resume at `position` needs to know beside it; empty, but for streams."""
        found: dict[str, Any] = {}
        return self.samples.state(position) if hasattr(self.samples, "state") else found

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; `steps` then begins at its position."""
        if state and hasattr(self.samples, "take_up"):
            self.samples.take_up(state)


def _pinned_ahead(batches: Generator[T]) -> Iterator[T]:
    import torch

    # a new thread would pin through the first device, whichever this rank's is
    device = torch.cuda.current_device()
    return _ahead(batches, depth=2, prepare=lambda: torch.cuda.set_device(device))


def divided(
    batch: Sequence[int] | NDArray[np.int64], samples: SampleSet, collate: Collate,
    division: Division, *, rank: int, size: int,
) -> tuple[list[list[int]], int]:  # fmt: skip
    """(this rank's micro-batches of some samples, the sample that stands in for none).

    Lengths are those after padding, where the set knows them and the collate has `padded`. The
    shortest sample stands in, so that no rank waits for one that has nothing to do.
    """
    lengths = _lengths(samples, batch) if division.by_length else None
    if lengths is None:
        return division.shares(batch, None, ranks=size)[rank], int(batch[0])
    padded = getattr(collate, "padded", None)
    known = lengths if padded is None else padded(lengths)
    stand_in = int(batch[int(np.argmin(lengths))])
    return division.shares(batch, known, ranks=size)[rank], stand_in


def _lengths(samples: SampleSet, batch: Any) -> NDArray[np.int64] | None:
    if hasattr(samples, "lengths_of"):
        found: NDArray[np.int64] = samples.lengths_of(batch)
        return found
    lengths = getattr(samples, "lengths", None)
    return None if lengths is None else np.asarray(lengths[np.asarray(batch)])


def _located(samples: SampleSet, rows: list[int]) -> list[Any]:
    """What a worker needs to find the samples: their numbers, unless the set says otherwise."""
    located: list[Any] = samples.located(rows) if hasattr(samples, "located") else rows
    return located


def _micro_batches(
    data: Sequence[dict[str, Tensor]], share: list[list[int]], stand_in: int
) -> list[MicroBatch]:
    return [
        MicroBatch(tensors, rows or [stand_in], idle=not rows)
        for tensors, rows in zip(data, share, strict=True)
    ]


def evaluation_batches(
    samples: SampleSet,
    collate: Collate,
    *,
    division: Division,
    rank: int = 0,
    size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[MicroBatch]:
    """The whole set, each sample once over all ranks; in its order, unless balanced.

    Every rank gets the same number of micro-batches, so that all take part in each forward (ZeRO-3
    gathers weights there); those that are `idle` count nothing.
    """
    if not len(samples):
        return iter(())
    everything = np.arange(len(samples))
    share, stand_in = divided(everything, samples, collate, division, rank=rank, size=size)

    def made() -> Generator[MicroBatch]:
        lists = [_located(samples, rows or [stand_in]) for rows in share]
        fetch = _Fetch(samples, collate)
        batches = _fetched(fetch, lists, num_workers=num_workers, pin_memory=pin_memory)
        for data, rows in zip(batches, share, strict=True):
            yield MicroBatch(data, rows or [stand_in], idle=not rows)

    return _pinned_ahead(made()) if pin_memory else made()
