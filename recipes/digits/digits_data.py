"""Scikit-learn's 1,797 handwritten digits of 8 × 8 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Digits:
    """Pairs (image, digit): (1, 8, 8) float32 in -1..1, and a number of 0..9.

    part: "train" or "test"; every fifth image is for testing.
    """

    def __init__(self, part: str = "train") -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        chosen = (np.arange(len(found.target)) % 5 == 0) == (part == "test")
        self.images = torch.from_numpy((found.images[chosen] / 8 - 1).astype(np.float32))[:, None]
        self.digits = torch.from_numpy(found.target[chosen].astype(np.int64))

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.digits[index]

    def facts(self) -> dict[str, Any]:
        """What models and metrics may ask for by name."""
        return {"num_classes": 10, "image_size": 8}
