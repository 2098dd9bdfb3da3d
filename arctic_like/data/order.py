"""Which samples make up which global batch: pure functions of a position.

A *position* is the number of samples that the run has passed since it began. Everything here is
arithmetic on it, so finding the place costs the same at step 10 and at step 10 million, and nothing
depends on ranks, workers, micro-batches or any random generator. Does not know what a sample holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from arctic_like.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDS = 8
_BLOCK = 4096
_PIECE = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15
_64 = (1 << 64) - 1


def mix(value: int) -> int:
    """One 64-bit integer hashed to another (splitmix64; Steele, Lea and Flood 2014)."""
    value = (value + _GOLDEN) & _64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _64
    return value ^ (value >> 31)


def key_of(*numbers: int) -> int:
    """A 64-bit key from several integers (a seed and an epoch, say); their order matters."""
    key = 0
    for number in numbers:
        key = mix(key ^ mix(number & _64))
    return key


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` without its first addition, element by element; uint64 arithmetic wraps."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=64)
def _round_keys(key: int) -> NDArray[np.uint64]:
    """(rounds, 1): one key for all values."""
    return np.array([[key_of(key, number)] for number in range(_ROUNDS)], dtype=np.uint64)


def _each_round_keys(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(rounds, values): `_round_keys` of a key for each value."""
    begun = _mixed(_mixed(keys))
    return np.stack([_mixed(begun ^ np.uint64(mix(number))) for number in range(_ROUNDS)])


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix`, element by element."""
    return _mix_array(values + np.uint64(_GOLDEN))


def _feistel(
    values: NDArray[np.uint64], *, half: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """A bijection of the integers of 2 × `half` bits (balanced Feistel network; Luby, Rackoff
    1988). keys: (rounds, 1) or (rounds, values)."""
    mask = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & mask
    for round_keys in keys:
        left, right = right, left ^ (_mix_array(right ^ round_keys) & mask)
    return (left << np.uint64(half)) | right


def permute(
    positions: NDArray[np.int64] | Sequence[int], *, size: int, key: int
) -> NDArray[np.int64]:
    """Where each position stands in a keyed permutation of `range(size)`; int64, same shape.

    A Feistel network over the next even power of two, walked until it comes back inside
    (cycle walking; Black and Rogaway 2002): O(1) expected for each position, whatever the size.
    Raises IndexError for a position outside `range(size)`.
    """
    wanted = np.asarray(positions, dtype=np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= size):
        raise IndexError(f"positions must lie in range({size})")
    values = _walked(wanted.astype(np.uint64).ravel(), size=size, keys=_round_keys(key))
    return values.astype(np.int64).reshape(wanted.shape)


def permute_each(
    places: NDArray[np.int64], passes: NDArray[np.int64], *, size: int, seed: int, source: int
) -> NDArray[np.int64]:
    """`permute` of each place by the permutation of its own pass, key_of(seed, source, pass): int64,
    one-dimensional as both are. Places lie in `range(size)`."""
    prefix = np.uint64(key_of(seed, source))
    keys = _mixed(prefix ^ _mixed(passes.astype(np.uint64)))
    values = _walked(places.astype(np.uint64), size=size, keys=_each_round_keys(keys))
    return values.astype(np.int64)


def _walked(
    values: NDArray[np.uint64], *, size: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(values, half=half, keys=keys)
    outside = np.flatnonzero(values >= np.uint64(size))
    while outside.size:
        mine = keys if keys.shape[1] == 1 else keys[:, outside]
        again = _feistel(values[outside], half=half, keys=mine)
        values[outside] = again
        outside = outside[again >= np.uint64(size)]
    return values


@lru_cache(maxsize=8)
def _ordered_block(size: int, key: int, block: int) -> NDArray[np.int64]:
    """Some thousand places of a permutation at once: numpy's calls cost more than their numbers."""
    places = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size), dtype=np.int64)
    return permute(places, size=size, key=key)


def _ordered(start: int, stop: int, *, size: int, key: int) -> NDArray[np.int64]:
    """Places `start` to `stop` of a permutation."""
    blocks = range(start // _BLOCK, (stop - 1) // _BLOCK + 1)
    order = np.concatenate([_ordered_block(size, key, block) for block in blocks])
    first = blocks[0] * _BLOCK
    found: NDArray[np.int64] = order[start - first : stop - first]
    return found


def _whole(stop: int, *, size: int, key: int) -> NDArray[np.int64]:
    """Places 0 to `stop` of a permutation, in pieces: `permute` takes some ten times what it returns."""
    pieces = range(0, stop, _PIECE)
    return np.concatenate(
        [permute(np.arange(at, min(at + _PIECE, stop)), size=size, key=key) for at in pieces]
    )


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step, over all ranks.

    position: samples passed before this batch. epoch: from 0. samples: indices, int64, in order.
    """

    position: int
    epoch: int
    samples: NDArray[np.int64]

    @property
    def next_position(self) -> int:
        """The position after this batch."""
        return self.position + len(self.samples)


class Plan(Protocol):
    """Global batch by position: what the loop and the loader ask of any order of samples."""

    @property
    def size(self) -> int:
        """Samples in the set."""

    @property
    def global_batch_size(self) -> int:
        """Samples of a full global batch."""

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch."""

    def at(self, position: int) -> GlobalBatch:
        """The global batch that begins at `position`; it never reaches into the next epoch."""


@dataclass(frozen=True)
class BatchPlan:
    """Global batch by position: each sample exactly once per epoch, the short last batch included.

    size: samples in the set. seed: shapes the order together with the epoch; without `shuffle`
    every epoch is in the set's order. drop_last: leave out the short last batch of each epoch
    (other samples each epoch); an epoch then has another length, so a change of the global batch
    size after the first epoch moves its borders. Without it the order of samples depends on
    size, seed and epoch alone, and a run may go on with any global batch size.
    """

    size: int
    global_batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.global_batch_size < 1:
            raise ValueError("a plan needs at least one sample, and at least one in a batch")
        if not self.batches_per_epoch:
            raise RecipeError(
                f"data.drop_last leaves nothing to train on: {self.size} samples do not fill one "
                f"global batch of {self.global_batch_size}; set data.drop_last: false"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of one epoch that starts at its first sample."""
        full, rest = divmod(self.size, self.global_batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch: all, or with `drop_last` those of full batches."""
        return self.batches_per_epoch * self.global_batch_size if self.drop_last else self.size

    def at(self, position: int) -> GlobalBatch:
        """The global batch that begins at `position`; it never reaches into the next epoch."""
        if position < 0:
            raise IndexError("a position is not negative")
        epoch, start = divmod(position, self.samples_per_epoch)
        stop = min(start + self.global_batch_size, self.samples_per_epoch)
        if not self.shuffle:
            return GlobalBatch(position, epoch, np.arange(start, stop, dtype=np.int64))
        order = _ordered(start, stop, size=self.size, key=key_of(self.seed, epoch))
        return GlobalBatch(position, epoch, order)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Samples of an epoch, in their order; int64, (samples_per_epoch,)."""
        if not self.shuffle:
            return np.arange(self.samples_per_epoch, dtype=np.int64)
        return _whole(self.samples_per_epoch, size=self.size, key=key_of(self.seed, epoch))


@dataclass(frozen=True)
class MixedPlan:
    """Global batch by position over several sources that lie one after another in one set.

    sizes: samples of each source. draws: how many of each an epoch takes, in an order shuffled over
    all of them. Draw j from a source in epoch e is number e · draws + j of an endless walk over it,
    whose every pass is a permutation of its own: no sample comes again before all others of its
    source came, whatever the number of draws.
    """

    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.draws) or min(self.sizes, default=0) < 1:
            raise ValueError("a mix needs sources with at least one sample, and draws of each")
        if min(self.draws) < 0 or not sum(self.draws) or self.global_batch_size < 1:
            raise ValueError("a mix draws at least one sample, and a batch holds at least one")

    @property
    def size(self) -> int:
        """Samples in all sources."""
        return sum(self.sizes)

    @property
    def samples_per_epoch(self) -> int:
        """Draws of one epoch."""
        return sum(self.draws)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of one epoch that starts at its first sample."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def at(self, position: int) -> GlobalBatch:
        """The global batch that begins at `position`; it never reaches into the next epoch."""
        if position < 0:
            raise IndexError("a position is not negative")
        total = self.samples_per_epoch
        epoch, start = divmod(position, total)
        stop = min(start + self.global_batch_size, total)
        slots = _ordered(start, stop, size=total, key=key_of(self.seed, epoch))
        return GlobalBatch(position, epoch, self._drawn(slots, epoch))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Samples of an epoch, in their order; int64, (samples_per_epoch,)."""
        total = self.samples_per_epoch
        slots = _whole(total, size=total, key=key_of(self.seed, epoch))
        return np.concatenate(
            [self._drawn(slots[at : at + _PIECE], epoch) for at in range(0, total, _PIECE)]
        )

    def _drawn(self, slots: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The sample of each draw of an epoch."""
        borders = np.cumsum((0, *self.draws))
        source = np.searchsorted(borders, slots, side="right") - 1
        walked = epoch * np.asarray(self.draws)[source] + slots - borders[source]
        passes, places = np.divmod(walked, np.asarray(self.sizes)[source])
        samples = np.cumsum((0, *self.sizes))[source]
        for one in np.unique(source).tolist():
            here = source == one
            samples[here] += permute_each(
                places[here], passes[here], size=self.sizes[one], seed=self.seed, source=1 + one
            )
        return samples


@dataclass(frozen=True)
class PlanOver:
    """What a plan that changes the order of another has from that one."""

    plan: Plan

    @property
    def size(self) -> int:
        """Samples in the set."""
        return self.plan.size

    @property
    def global_batch_size(self) -> int:
        """Samples of a full global batch."""
        return self.plan.global_batch_size

    @property
    def samples_per_epoch(self) -> int:
        """Samples of one epoch."""
        return self.plan.samples_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return self.plan.batches_per_epoch

    @property
    def is_of_one_batch_size(self) -> bool:
        """Whether a run must keep its global batch size."""
        return bool(getattr(self.plan, "is_of_one_batch_size", False))


@dataclass(frozen=True)
class GroupedPlan(PlanOver):
    """Another plan's samples, those of like length in one global batch (`group_by_length`).

    Some global batches of the plan, a window, are taken together, sorted by length, cut anew and
    put into a shuffled order; their last one stays short where it was. Depends on the plan, the
    lengths and the seed alone. A window costs the same everywhere, so any position does.

    lengths: tokens of each sample of the set, int64. window: global batches.
    """

    lengths: NDArray[np.int64]
    seed: int
    window: int = 64

    @property
    def is_of_one_batch_size(self) -> bool:
        """Another global batch size has other windows: a run keeps its own."""
        return True

    def at(self, position: int) -> GlobalBatch:
        """The global batch that begins at `position`. Raises IndexError where none begins there."""
        epoch, inside = divmod(position, self.samples_per_epoch)
        number, rest = divmod(inside, self.global_batch_size)
        if position < 0 or rest:
            raise IndexError(f"no global batch of {self.global_batch_size} begins at {position}")
        window, place = divmod(number, self.window)
        return GlobalBatch(position, epoch, self._window(epoch, window)[place])

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Samples of an epoch, in their order; int64, (samples_per_epoch,)."""
        windows = range(-(-self.batches_per_epoch // self.window))
        return np.concatenate([b for w in windows for b in self._regrouped(epoch, w)])

    def _window(self, epoch: int, window: int) -> list[NDArray[np.int64]]:
        if self._last[0] != (epoch, window):
            self._last[:] = [(epoch, window), self._regrouped(epoch, window)]
        found: list[NDArray[np.int64]] = self._last[1]
        return found

    @cached_property
    def _last(self) -> list[Any]:
        return [None, []]

    def _regrouped(self, epoch: int, window: int) -> list[NDArray[np.int64]]:
        batch = self.global_batch_size
        first = window * self.window
        last = min(first + self.window, self.batches_per_epoch)
        begin = epoch * self.samples_per_epoch
        together = np.concatenate(
            [self.plan.at(begin + number * batch).samples for number in range(first, last)]
        )
        ordered = together[np.argsort(self.lengths[together], kind="stable")]
        full, rest = divmod(len(together), batch)
        key = key_of(self.seed, epoch, window, 0)
        # the short batch, if there is one, is taken from any length
        cut = permute([0], size=full + 1, key=key_of(key, 1))[0] * batch if rest else len(ordered)
        short, whole = ordered[cut : cut + rest], np.delete(ordered, np.s_[cut : cut + rest])
        numbers = permute(np.arange(full), size=full, key=key).tolist() if full else []
        batches = [whole[n * batch : (n + 1) * batch] for n in numbers]
        return [*batches, short] if rest else batches


def split(
    samples: Sequence[int] | NDArray[np.int64], *, micro_batch_size: int, rank: int, size: int
) -> list[list[int]]:
    """The micro-batches of one rank: chunk c of the global batch goes to rank c % size.

    Every rank gets the same number of micro-batches; an empty list stands for nothing to do.
    """
    if micro_batch_size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} with micro-batches of {micro_batch_size}")
    listed = [int(sample) for sample in samples]
    chunks = [
        listed[start : start + micro_batch_size]
        for start in range(0, len(listed), micro_batch_size)
    ]
    rounds = -(-len(chunks) // size)
    chunks += [[] for _ in range(rounds * size - len(chunks))]
    return chunks[rank::size]
