"""A data set, a network and trainers written with the names that users of other trainers know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

from arctic_like import Trainer
from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.trainer.config import LearnerConfig, TrainerConfig


class Points:
    """Pairs (three numbers, their weighted sum), the same in every process."""

    def __init__(self, size: int = 12, start: int = 0) -> None:
        place = torch.arange(start, start + size).float()[:, None]
        self.x = torch.sin(place * torch.tensor([[0.3, 0.7, 1.1]]))
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Net(nn.Module):
    """Three numbers to one."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, width), nn.Tanh())
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.encoder(x))
        return made


class Visits:
    """Counts; has a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class OwnConfig(TrainerConfig):
    """A second model that is trained, and one that is not."""

    type: str = "test_own_names"
    critic: LearnerConfig
    teacher: LearnerConfig


class OwnNames(Trainer):
    """Every step takes (batch, batch_idx)."""

    name = "test_own_names"
    config_type = OwnConfig
    data_factory_type = ("torch",)
    model_factory_type = ("torch",)
    tokenizer_factory_type = ("none",)

    def configure(self) -> None:
        self.was_built = sorted(self.named_models)
        self.visits = self.checkpoint_objects["visits"] = Visits()
        self.indices: dict[str, list[int]] = {"training": [], "validation": [], "test": []}
        self.told: list[tuple[Any, ...]] = []

    def step(self, micro_batches: Any) -> None:
        self.update("critic", micro_batches)
        self.update("model", micro_batches)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.visits.count += 1
        self.indices["training"].append(batch_idx)
        return mse_loss(self.learner(self.updating).engine.engine(batch[0]), batch[1])

    def get_val_metrics(self) -> dict[str, Any]:
        return {"mae": MeanAbsoluteError()}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.indices["validation"].append(batch_idx)
        made = self.model(batch[0])
        self.val_metrics["mae"].update(made, batch[1])
        return {"loss": mse_loss(made, batch[1]), "largest": made.abs().mean()}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.indices["test"].append(batch_idx)
        return {"loss": 2 * mse_loss(self.model(batch[0]), batch[1])}

    def after_densify(self, rows: int) -> None:
        self.told.append(("trainer", rows))


class Listening(Callback):
    """Has a moment that no shipped trainer knows."""

    name = "test_listening"
    config_type = CallbackConfig

    def after_densify(self, trainer: Any, rows: int) -> None:
        trainer.told.append(("callback", rows))
