"""Samples of different lengths → one padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arctic_like.data.packing import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from arctic_like.data.base import Sample


@dataclass(frozen=True)
class PaddingCollate:
    """Pads on the right. The padding of a row is a document of its own: position ids restart at 0,
    labels are -100, the token is `pad_token_id`, and every further array holds -1.

    at_most: longest row, unless a sample is longer. multiple: rows are as long as the longest sample,
    rounded up to a multiple of it. fixed: rows are always `at_most` long.
    """

    pad_token_id: int
    multiple: int = 1
    at_most: int | None = None
    fixed: bool = False

    def padded(self, longest: NDArray[np.int64]) -> NDArray[np.int64]:
        """The length of batches whose longest samples have so many tokens; int64, same shape."""
        if self.fixed and self.at_most is not None:
            return np.maximum(longest, self.at_most)
        rounded = -(-longest // self.multiple) * self.multiple
        if self.at_most is None:
            return rounded
        return np.maximum(longest, np.minimum(rounded, self.at_most))

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Each array of the samples as (len(samples), length) int64."""
        import torch

        longest = max(len(sample["input_ids"]) for sample in samples)
        length = int(self.padded(np.array(longest)))
        fills = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch: dict[str, Tensor] = {}
        for name in samples[0]:
            rows = np.full((len(samples), length), fills.get(name, -1), dtype=np.int64)
            for row, sample in zip(rows, samples, strict=True):
                end = len(sample[name])
                row[:end] = sample[name]
                if name == "position_ids":
                    row[end:] = np.arange(length - end)
            batch[name] = torch.from_numpy(rows)
        return batch
