"""Trainers whose loss takes the head by itself, for runs that are compared with `type: sft`."""

from __future__ import annotations

from typing import Any

from arctic_like.kernels.linear_loss import (
    linear_cross_entropy,
    linear_cross_entropy_sum,
    next_tokens,
)
from arctic_like.model.heads import find_head, through_head
from arctic_like.trainer.sft import SFTTrainer


class TiledSFT(SFTTrainer):
    """The sum whose gradient is computed in the forward."""

    name = "tiled_sft"

    def loss(self, batch: dict[str, Any]) -> Any:
        if not hasattr(self, "head"):
            search = find_head(self.module, device=self.device)
            assert search.head is not None, search.reason
            self.head = search.head
        targets = next_tokens(batch["labels"])
        found = through_head(
            self.head,
            lambda: self.model(**self.model_inputs(batch)),
            lambda hidden, own: self.computed(hidden, own, targets),
        )
        return found[0].sum() / (targets != -100).sum().clamp(min=1)

    def computed(self, hidden: Any, own: Any, targets: Any) -> tuple[Any, ...]:
        found = linear_cross_entropy_sum(hidden, own.weight, targets, bias=own.bias, tile=13)
        return found.total, found.losses


class EachSFT(TiledSFT):
    """Losses of tokens, computed again in the backward."""

    name = "each_sft"

    def computed(self, hidden: Any, own: Any, targets: Any) -> tuple[Any, ...]:
        return (linear_cross_entropy(hidden, own.weight, targets, bias=own.bias, tile=13),)
