"""Orders of samples whose epochs are not one pass: endless streams, and epochs of a stated length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arctic_like.data.order import GlobalBatch, key_of, permute

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class _Lengths:
    """size: samples in the set. samples_per_epoch: of one epoch, however often it passes the set."""

    size: int
    samples_per_epoch: int
    global_batch_size: int

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last may be short."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def at(self, position: int) -> GlobalBatch:
        """The global batch that begins at `position`; it never reaches into the next epoch."""
        epoch, start = divmod(position, self.samples_per_epoch)
        count = min(self.global_batch_size, self.samples_per_epoch - start)
        return GlobalBatch(position, epoch, self._samples(np.arange(position, position + count)))

    def _samples(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        raise NotImplementedError


@dataclass(frozen=True)
class SequentialPlan(_Lengths):
    """Sample n of the run is number n of a set that is read from its front on, without end."""

    def _samples(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return numbers


@dataclass(frozen=True)
class VirtualEpochPlan(_Lengths):
    """Pass after pass over a set, each in an order keyed by (seed, pass); an epoch is a stretch of that.

    Any position costs the same; every sample comes once in each pass, wherever epochs begin.
    """

    seed: int = 0

    def _samples(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        passes, places = np.divmod(numbers, self.size)
        found = np.empty_like(numbers)
        for one in np.unique(passes):
            mine = passes == one
            key = key_of(self.seed, int(one))
            found[mine] = permute(places[mine], size=self.size, key=key)
        return found
