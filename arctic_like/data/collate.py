"""Samples of different lengths → one padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arctic_like.data.packing import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.data.base import Sample


def padded_length(longest: int, *, multiple: int, at_most: int | None, fixed: bool) -> int:
    """Length of a batch whose longest sample has `longest` tokens.

    fixed: always `at_most`. Otherwise the next multiple, but not above `at_most`, unless a sample
    is.
    """
    if fixed and at_most is not None:
        return max(at_most, longest)
    rounded = -(-longest // multiple) * multiple
    return rounded if at_most is None else max(longest, min(rounded, at_most))


@dataclass(frozen=True)
class PaddingCollate:
    """Pads on the right. The padding of a row is a document of its own: position ids restart at 0,
    labels are -100, and the token is `pad_token_id`."""

    pad_token_id: int
    multiple: int = 1
    at_most: int | None = None
    fixed: bool = False

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Each of `input_ids`, `labels`, `position_ids`: (len(samples), length) int64."""
        import torch

        longest = max(len(sample["input_ids"]) for sample in samples)
        length = padded_length(
            longest, multiple=self.multiple, at_most=self.at_most, fixed=self.fixed
        )
        shape = (len(samples), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        for row, sample in enumerate(samples):
            end = len(sample["input_ids"])
            input_ids[row, :end] = sample["input_ids"]
            labels[row, :end] = sample["labels"]
            position_ids[row, :end] = sample["position_ids"]
            position_ids[row, end:] = np.arange(length - end)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
        }
