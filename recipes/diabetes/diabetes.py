"""Scikit-learn's diabetes data: ten measurements of 442 patients, and how their disease went on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arctic_like.trainer.criteria import Criterion, CriterionConfig


class Patients:
    """Maps {inputs: (10,), targets: (1,)} float32.

    part: "train" or "test"; every fifth patient is for testing.
    """

    def __init__(self, part: str = "train") -> None:
        from sklearn.datasets import load_diabetes

        found = load_diabetes(scaled=True)
        chosen = (np.arange(len(found.target)) % 5 == 0) == (part == "test")
        # the columns have a norm of 1; here a standard deviation
        self.inputs = torch.from_numpy((found.data[chosen] * 21.0).astype(np.float32))
        self.targets = torch.from_numpy(found.target[chosen, None].astype(np.float32))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "targets": self.targets[index]}

    def facts(self) -> dict[str, Any]:
        """Mean and standard deviation of the targets, which the loss asks for by name."""
        return {"target_mean": float(self.targets.mean()), "target_std": float(self.targets.std())}


class Predictor(nn.Module):
    """(rows, 10) to (rows, 1), in the unit of the targets; begins at their mean."""

    def __init__(self, target_mean: float, target_std: float, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, 1))
        self.mean, self.std = target_mean, target_std

    def forward(self, inputs: Tensor) -> Tensor:
        predicted: Tensor = self.layers(inputs) * self.std + self.mean
        return predicted


class NormalisedConfig(CriterionConfig):
    """`type: normalised_mse`."""

    type: str = "normalised_mse"


class NormalisedMSE(Criterion):
    """Squared error in units of the targets' variance: 1 is what their mean would score."""

    name = "normalised_mse"
    config_type = NormalisedConfig

    def setup(self, target_std: float) -> None:
        self.variance = target_std**2

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() / self.variance
