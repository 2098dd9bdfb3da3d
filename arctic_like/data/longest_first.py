"""The most demanding global batch of a set comes first, so that what does not fit fails at once.

Memory is asked for most by the longest samples. In a shuffled order they come together late, or never in
the first epoch and then in the second. Here the first global batch of epoch 0 is made of the longest of the
epoch: no later micro-batch of as many rows is longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from arctic_like.data.order import GlobalBatch, Plan, PlanOver

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arctic_like.data.base import SampleSet

_FACTOR = np.int64(1) << np.int64(31)


@runtime_checkable
class ShuffledPlan(Plan, Protocol):
    """A plan that can say the order of a whole epoch at once."""

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Samples of an epoch, in their order; int64, (samples_per_epoch,)."""


@dataclass(frozen=True)
class LongestFirst(PlanOver):
    """Another plan's order, with the longest samples of epoch 0 in front.

    They change places with those that stood there: everything else, and every later epoch, is as it was,
    and each sample still comes as often as it did. Of equal length are first those with more trained tokens,
    then those that came earlier; where all are alike nothing changes. Depends on the plan, the lengths
    and `count`, so that a run may go on with any global batch size that its plan allows, if it keeps `count`.

    lengths, weights: tokens and trained tokens of each sample of the set, int64, below 2³¹. count: how many
    come first: the samples of a global batch when the run began.
    """

    plan: ShuffledPlan
    lengths: NDArray[np.int64]
    weights: NDArray[np.int64]
    count: int

    def at(self, position: int) -> GlobalBatch:
        """The global batch that begins at `position`; it never reaches into the next epoch.

        The first call in epoch 0 looks through that epoch once: a second for some million samples.
        """
        batch = self.plan.at(position)
        if batch.epoch:
            return batch
        places, samples = self._moved
        first, last = np.searchsorted(places, [position, batch.next_position])
        if first == last:
            return batch
        own = batch.samples.copy()
        own[places[first:last] - position] = samples[first:last]
        return GlobalBatch(position, 0, own)

    @cached_property
    def _moved(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(places of epoch 0 that have another sample than in the plan, ascending; their samples)."""
        order = self.plan.order(0)
        count = min(self.count, len(order))
        demand = self.lengths[order] * _FACTOR + self.weights[order]
        longest = _largest(demand, count)
        # those in front that must go take the places that become free, in their order
        front = np.arange(count)
        places = np.concatenate([front, np.sort(longest[longest >= count])])
        samples = order[np.concatenate([longest, np.setdiff1d(front, longest)])]
        differs = order[places] != samples
        return places[differs], samples[differs]


def longest_first(plan: Plan, samples: SampleSet, *, count: int) -> Plan:
    """The plan, with the `count` longest samples first where it shuffles a set whose lengths are known."""
    if not count or not isinstance(plan, ShuffledPlan):  # a stream refuses to be asked for lengths
        return plan
    lengths, weights = getattr(samples, "lengths", None), getattr(samples, "weights", None)
    if lengths is None or weights is None:
        return plan
    return LongestFirst(plan, lengths, weights, count)


def _largest(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Where the `count` largest values stand, the largest first, equal ones in their order."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > least)
        equal = np.flatnonzero(values == least)[: count - len(above)]
        found = np.concatenate([above, equal])
    else:
        found = np.arange(len(values))
    ordered: NDArray[np.int64] = found[np.lexsort((found, -values[found]))]
    return ordered
