"""A model with attention of its own that ranks share, and the trainer that says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from arctic_like.config.base import PartConfig
from arctic_like.model.base import ModelConfig, ModelFactory
from arctic_like.sequence import SequenceGroup, block_mask, borders_of, ulysses
from arctic_like.trainer.sft import SFTTrainer

WIDTH, HEADS = 32, 4


class OwnModel(nn.Module):
    """One layer of attention over learned embeddings of tokens and positions."""

    def __init__(self, group: SequenceGroup) -> None:
        super().__init__()
        self.group = group
        self.tokens, self.places = nn.Embedding(262, WIDTH), nn.Embedding(256, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 262)

    def forward(self, input_ids: Any, position_ids: Any, borders: Any) -> Any:
        hidden = self.tokens(input_ids) + self.places(position_ids)
        rows, part = input_ids.shape
        q, k, v = self.qkv(hidden).view(rows, part, 3, HEADS, -1).permute(2, 0, 3, 1, 4)

        def attend(q: Any, k: Any, v: Any) -> Any:
            length = q.shape[2]
            mask = block_mask(borders, rows=rows, length=length)
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)

        mixed = ulysses(attend, q, k, v, group=self.group).transpose(1, 2).flatten(2)
        return SimpleNamespace(logits=self.head(hidden + mixed))


class OwnConfig(ModelConfig):
    """The recipe's `model: {type: own}`."""

    type: str = "own"
    """This one."""


class OwnFactory(ModelFactory):
    """Makes it, with the weights of the seed."""

    name = "own"
    config_type: ClassVar[type[PartConfig]] = OwnConfig
    shares_sequences: ClassVar[bool] = True

    def build(self, *, seed: int, **_: Any) -> Any:
        """See `ModelFactory.build`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return OwnModel(SequenceGroup())


class OwnSFT(SFTTrainer):
    """Tells its model who shares its rows."""

    name = "own_sft"
    shares_sequences: ClassVar[bool] = True
    model_factory_type: ClassVar[Any] = (OwnFactory,)

    def configure(self) -> None:
        """The model gets the group."""
        self.module.group = self.sequence

    def model_inputs(self, batch: Any) -> dict[str, Any]:
        """Tokens, their positions, and where documents end."""
        borders = batch.get("borders")
        if borders is None:
            borders = borders_of(batch["position_ids"])
        return {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "borders": borders,
        }
