"""An image as a sum of coloured 2D Gaussians that are fitted, cloned, split and pruned while training.

The picture is cut into tiles, which are the samples: any number of ranks and micro-batches sees
all of them in a step. Positions are in units of the image's longer side.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from arctic_like import Trainer
from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.data.order import key_of
from arctic_like.engine.surgery import Rows
from arctic_like.registry import Part, build
from arctic_like.registry.choice import Choice
from arctic_like.scheduler.base import SchedulerConfig, SchedulerFactory
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.noise import normal_noise

SMALLEST = 1e-3
"""Of a Gaussian's standard deviation, in units of the image's longer side."""


# --- the data: tiles of one of scikit-learn's two pictures


class Tiles:
    """Maps {pixels: (tile², 3) in 0..1, places: (tile², 2)}, all float32."""

    def __init__(self, size: int = 64, tile: int = 16) -> None:
        from PIL import Image
        from sklearn.datasets import load_sample_image

        picture = Image.fromarray(load_sample_image("flower.jpg")[:, 100:527])
        shown = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
        self.image = torch.from_numpy((shown / 255).astype(np.float32))
        centres = (torch.arange(size) + 0.5) / size
        places = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), dim=-1)
        self.pixels, self.places = (_cut(whole, tile) for whole in (self.image, places))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.pixels[index], "places": self.places[index]}

    def facts(self) -> dict[str, Any]:
        """The scene's radius: half of its diagonal, which learning rates of positions scale with."""
        height, width, _ = self.image.shape
        return {"scene_radius": math.hypot(height, width) / max(height, width) / 2}


def _cut(whole: Tensor, tile: int) -> Tensor:
    """(size, size, channels) to (tiles, tile², channels)."""
    size, _, channels = whole.shape
    count = size // tile
    parts = whole.view(count, tile, count, tile, channels).transpose(1, 2)
    return parts.reshape(count * count, tile * tile, channels)


# --- the model: parameters only; what they mean is the renderer's business


class Splats(nn.Module):
    """Gaussians by row: `means` (n, 2), `scales` (n, 2, logarithms), `angles` (n, 1), `colours` (n, 3),
    `opacities` (n, 1, before the sigmoid)."""

    def __init__(self, count: int = 48) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.rand(count, 2))
        self.scales = nn.Parameter(torch.full((count, 2), math.log(0.4 / math.sqrt(count))))
        self.angles = nn.Parameter(torch.rand(count, 1) * math.pi)
        self.colours = nn.Parameter(torch.full((count, 3), 0.5) + 0.05 * torch.randn(count, 3))
        self.opacities = nn.Parameter(torch.full((count, 1), 0.0))

    def forward(self, renderer: Any, places: Tensor) -> Tensor:
        """Colours (rows, points, 3) at `places` (rows, points, 2)."""
        drawn: Tensor = renderer(
            places, self.means, self.scales, self.angles, self.colours, self.opacities
        )
        return drawn


# --- a family of one's own


class RendererConfig(PartConfig):
    """The recipe's `renderer:`."""

    type: str = "gaussian_sum"


class Renderer(Part, family="renderer"):
    """Draws Gaussians at places; differentiable in all of them."""

    config_type = RendererConfig
    config: Any

    def __call__(self, places: Tensor, *attributes: Tensor) -> Tensor:
        """(rows, points, 2) to (rows, points, 3)."""
        raise NotImplementedError


class GaussianSum(Renderer):
    """The sum of all Gaussians, in no order (Zhang et al. 2024, GaussianImage, equation 7)."""

    name = "gaussian_sum"

    def __call__(self, places: Tensor, *attributes: Tensor) -> Tensor:
        means, scales, angles, colours, opacities = attributes
        rotation = _rotation(angles)
        # Σ^(-1/2) = S^-1 Rᵀ; its square is the Mahalanobis distance
        whiten = rotation.mT / scales.exp().clamp(min=SMALLEST)[:, :, None]
        offsets = places[:, :, None] - means
        distance = torch.einsum("nij,rpnj->rpni", whiten, offsets).square().sum(-1)
        shares = torch.exp(-0.5 * distance) * opacities.sigmoid().squeeze(-1)
        return shares @ colours


def _rotation(angles: Tensor) -> Tensor:
    """(n, 1) radians to (n, 2, 2)."""
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)], dim=1)


# --- a schedule that asks for what the data publishes


class RadiusDecayConfig(SchedulerConfig):
    """`type: radius_decay`."""

    type: str = "radius_decay"

    final: HumanFloat = Field(default=0.01, gt=0)
    """Learning rate at the end, as a share of the one at the start."""


class RadiusDecay(SchedulerFactory):
    """learning_rate · scene_radius · final^(step / total_steps)."""

    name = "radius_decay"
    config_type = RadiusDecayConfig
    config: Any

    def build(self, *, optimizer: Any, total_steps: int, scene_radius: float) -> Any:  # type: ignore[override]
        final = self.config.final
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: scene_radius * final ** (step / total_steps)
        )


# --- the trainer


class SplatConfig(TrainerConfig):
    """A recipe of `type: splats`."""

    type: str = "splats"

    renderer: Annotated[PartConfig, Choice("renderer", default="gaussian_sum")] = Field(
        default_factory=dict  # type: ignore[arg-type]
    )
    """How Gaussians become a picture."""

    densify_every: HumanInt = Field(default=50, ge=1)
    """Steps between two rounds of cloning, splitting and pruning."""

    densify_until: HumanInt = Field(default=600, ge=0)
    """No more rounds after this step."""

    gradient_threshold: HumanFloat = Field(default=2e-4, gt=0)
    """Mean length of the gradient of a position above which a Gaussian is split in two."""

    prune_below: HumanFloat = Field(default=0.02, ge=0)
    """Opacity below which a Gaussian is removed."""

    most: HumanInt = Field(default=400, ge=1)
    """Never more Gaussians than this."""


class SplatTrainer(Trainer):
    """Least squares over pixels; positions whose gradient stays long are split (Kerbl et al. 2023, 5.2)."""

    name = "splats"
    config_type: ClassVar[Any] = SplatConfig
    data_factory_type = ("torch",)
    model_factory_type = ("torch",)
    tokenizer_factory_type = ("none",)
    scheduler_factory_type = ("huggingface", "module.Class", RadiusDecay)

    def configure(self) -> None:
        self.renderer = build(self.config.renderer, "renderer")
        count = len(self.shape_of("means"))
        self.pulls, self.rounds = torch.zeros(count), 0

    def shape_of(self, name: str) -> range:
        """The Gaussians, by the rows of a parameter."""
        return range(self.learner().engine.shapes()[name][0])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        drawn = self.model(self.renderer, batch["places"])
        return (drawn - batch["pixels"]).square().mean()

    def on_evaluate_end(self, results: dict[str, float]) -> None:
        results["eval/psnr"] = -10 * math.log10(results["eval/loss"])
        results["eval/gaussians"] = float(len(self.pulls))

    # --- growth, between the backward pass and the update

    def on_gradients_ready(self) -> None:
        config, step = self.config, self.global_step + 1
        if step > config.densify_until:
            return
        self.pulls += self.gradients()["means"].norm(dim=1).cpu()
        self.rounds += 1
        if step % config.densify_every == 0:
            self.densify(step)

    def densify(self, step: int) -> None:
        """Split what is pulled about, prune what is not seen; moments of the Adam states follow."""
        config = self.config
        values = {n: v.detach().cpu() for n, v in self.learner().engine.named_full_parameters()}
        kept = values["opacities"].sigmoid().squeeze(1) >= config.prune_below
        pull = torch.where(kept, self.pulls / self.rounds, 0.0)
        room = config.most - int(kept.sum())
        wanted = (pull > config.gradient_threshold).nonzero().squeeze(1)
        chosen = wanted[pull[wanted].argsort(descending=True, stable=True)][: max(room, 0)]
        new = {name: value[chosen].clone() for name, value in values.items()}
        key = key_of(self.config.seed, step)
        shift = normal_noise(chosen.tolist(), [2], key=key) * new["scales"].exp()
        turned = torch.einsum("nij,nj->ni", _rotation(new["angles"]), shift)
        new["means"] += turned
        new["scales"] -= math.log(1.6)
        self.resize({name: Rows(keep=kept, new=new[name]) for name in values})
        self.pulls, self.rounds = torch.zeros(int(kept.sum()) + len(chosen)), 0
        self.emit("after_densify", int(kept.sum()), len(chosen))

    def get_extra_state(self) -> dict[str, Any]:
        return {"pulls": self.pulls, "rounds": self.rounds}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.pulls, self.rounds = state["pulls"], state["rounds"]

    def picture(self) -> np.ndarray:
        """(size, size, 3) uint8, what the Gaussians draw. Collective."""
        samples = self.equipment.data.train
        places = torch.stack([samples[i]["places"] for i in range(len(samples))])
        with torch.no_grad():
            tiles = self.module(self.renderer, places.to(self.device)).float().cpu().numpy()
        count, points = math.isqrt(len(tiles)), math.isqrt(tiles.shape[1])
        whole = tiles.reshape(count, count, points, points, 3).transpose(0, 2, 1, 3, 4)
        return (whole.reshape(count * points, count * points, 3).clip(0, 1) * 255).astype(np.uint8)


class PicturesConfig(CallbackConfig):
    """`type: pictures`."""

    type: str = "pictures"


class Pictures(Callback):
    """Writes `before.png` and `after.png` (with the target beside it) into the run directory."""

    name = "pictures"
    config_type = PicturesConfig

    def on_train_start(self, trainer: Any) -> None:
        if trainer.global_step == 0:
            self.write(trainer, "before.png")

    def on_train_end(self, trainer: Any) -> None:
        self.write(trainer, "after.png")

    def after_densify(self, trainer: Any, kept: int, added: int) -> None:
        from loguru import logger

        logger.debug(f"step {trainer.global_step + 1}: {kept} Gaussians stay, {added} are new")

    def write(self, trainer: Any, name: str) -> None:
        from PIL import Image

        drawn = trainer.picture()
        if trainer.world.is_main:
            target = (trainer.equipment.data.train.dataset.image.numpy() * 255).astype(np.uint8)
            both = np.concatenate([target, drawn], axis=1)
            path: Path = trainer.session.directory.path / name
            Image.fromarray(both).resize((1024, 512), Image.Resampling.NEAREST).save(path)
