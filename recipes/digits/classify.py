"""A small network for digits, and a picture of what it confuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from digits_data import Digits
from torch import Tensor, nn

from arctic_like.callbacks.base import Callback, CallbackConfig

__all__ = ["ConfusionPicture", "Digits", "SmallNet"]


class SmallNet(nn.Module):
    """Two convolutions and a linear layer: (rows, 1, 8, 8) to (rows, num_classes)."""

    def __init__(self, num_classes: int, width: int = 32, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(2 * width * 16, num_classes),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores


class ConfusionPictureConfig(CallbackConfig):
    """`type: confusion_picture`."""

    type: str = "confusion_picture"

    metric: str = "test/confusion"
    """The metric that holds the matrix."""


class ConfusionPicture(Callback):
    """Writes the test's confusion matrix as `confusion.png` into the run directory."""

    name = "confusion_picture"
    config_type = ConfusionPictureConfig
    main_rank_only = True

    def on_test_end(self, trainer: Any, results: dict[str, float]) -> None:
        matrix = trainer.evaluation_values.get(self.config.metric)
        if matrix is not None:
            draw(matrix.cpu().numpy(), trainer.session.directory.path / "confusion.png")


def draw(matrix: np.ndarray, path: Path) -> None:
    """(digits, digits) counts of target and prediction as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matrix, cmap="Blues", norm="symlog")
    for row, column in np.ndindex(*matrix.shape):
        if count := int(matrix[row, column]):
            axes.text(column, row, count, ha="center", va="center",
                      color="white" if row == column else "black")  # fmt: skip
    axes.set(
        xticks=range(len(matrix)), yticks=range(len(matrix)), xlabel="predicted", ylabel="digit"
    )
    figure.savefig(path, dpi=120)
