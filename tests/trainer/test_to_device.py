"""Batches that go to another device than the CPU: torch's `meta` is one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from arctic_like.trainer.base import Trainer
from arctic_like.trainer.classification import ClassificationTrainer
from arctic_like.trainer.embedding import EmbeddingTrainer


def elsewhere(kind: type[Trainer], **config: Any) -> Any:
    """A trainer of that kind with nothing but its config, whose rank computes on `meta`."""

    class Elsewhere(kind):  # type: ignore[misc, valid-type]
        name = f"test_elsewhere_{kind.name}"
        device = "meta"

        def __init__(self) -> None:
            self.config = SimpleNamespace(**config)

    return Elsewhere()


ROW = {
    "input_ids": torch.tensor([[1, 2, 3, 4]]), "segment_ids": torch.tensor([[0, 0, 1, 1]]),
    "text_keys": torch.tensor([[5, 5, 6, 6]]), "labels": torch.tensor([[0, 1, 0, 1]]),
}  # fmt: skip


@pytest.mark.parametrize(
    "trainer",
    [
        elsewhere(EmbeddingTrainer, data=SimpleNamespace(negatives=0)),
        elsewhere(ClassificationTrainer, task="token"),
    ],
    ids=["embedding", "classification"],
)
def test_what_a_trainer_makes_of_a_batch_is_on_the_device(trainer: Any) -> None:
    moved = trainer.to_device(ROW)
    assert moved
    assert {name: value.device.type for name, value in moved.items()} == dict.fromkeys(
        moved, "meta"
    )


def test_values_inside_of_values_are_moved_and_others_stay() -> None:
    pair = torch.ones(1)
    moved = elsewhere(Trainer).to_device({"a": [pair, (pair, "word")], "b": 3})
    first, (second, word) = moved["a"]
    assert [one.device.type for one in (first, second)] == ["meta", "meta"]
    assert (word, moved["b"]) == ("word", 3)
