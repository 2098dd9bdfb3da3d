"""A generator and a critic of DCGAN's shape for digits of 8 × 8 pixels, and a picture of samples.

Normalisation is by groups of channels, not by batch: what a sample becomes depends on it alone, so a
step is the same however the global batch is divided.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from digits_data import Digits
from torch import Tensor, nn

from arctic_like.callbacks.base import Callback, CallbackConfig

__all__ = ["Critic", "Digits", "Generator", "SampleGrid"]


def _weights(module: nn.Module) -> None:
    """Normal(0, 0.02) for convolutions, as in Radford et al. 2015, section 4."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)


class Generator(nn.Module):
    """(rows, latent) to (rows, 1, 8, 8) in -1..1."""

    def __init__(self, latent_size: int = 64, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(latent_size, 2 * width, 2), nn.GroupNorm(8, 2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.GroupNorm(8, width), nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 4, stride=2, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.apply(_weights)

    def forward(self, latent: Tensor) -> Tensor:
        images: Tensor = self.layers(latent[:, :, None, None])
        return images


class Critic(nn.Module):
    """(rows, 1, 8, 8) to one score a row."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 2), nn.Flatten(),
        )  # fmt: skip
        self.apply(_weights)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images)
        return scores


class SampleGridConfig(CallbackConfig):
    """`type: sample_grid`."""

    type: str = "sample_grid"

    every: int = 100
    """Write a picture after every so many steps, and after the last one."""

    rows: int = 8
    """Samples of the picture in each direction."""


class SampleGrid(Callback):
    """Writes `samples/step-N.png` into the run directory, always of the same noise."""

    name = "sample_grid"
    config_type = SampleGridConfig

    def on_step_end(self, trainer: Any) -> None:
        step = trainer.global_step
        if step % self.config.every and step != trainer.training_horizon:
            return
        images = trainer.generate(self.config.rows**2).float().cpu().numpy()
        if trainer.world.is_main:
            folder = trainer.session.directory.path / "samples"
            folder.mkdir(exist_ok=True)
            write_grid(images[:, 0], self.config.rows, folder / f"step-{step}.png")


def write_grid(images: np.ndarray, rows: int, path: Path, zoom: int = 6) -> None:
    """(rows², height, width) in -1..1 as one picture of `rows` × `rows`."""
    from PIL import Image

    count, height, width = images.shape
    framed = np.pad(images, ((0, 0), (0, 1), (0, 1)), constant_values=1.0)
    grid = framed.reshape(rows, count // rows, height + 1, width + 1)
    grid = grid.transpose(0, 2, 1, 3).reshape(rows * (height + 1), -1)
    pixels = ((grid + 1) * 127.5).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)).save(path)
