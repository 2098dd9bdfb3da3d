"""`causal`: next-token prediction over plain text, and the base of the language-model trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.loss import Loss
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor


class CausalConfig(TrainerConfig):
    """A recipe of `type: causal`."""

    type: str = "causal"
    """The trainer: every token of a text is trained."""


class CausalTrainer(Trainer):
    """Mean cross-entropy of the next token over all trained labels."""

    name = "causal"
    config_type: ClassVar[type[TrainerConfig]] = CausalConfig
    data_factory_type: ClassVar[Any] = ("causal", "sft")
    weight_unit: ClassVar[str] = "tokens"

    def loss(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """Mean over `weight(batch)` trained labels of -log p(next token); where the batch says which
        source each token is from, also each source's own (`loss/<source>`)."""
        from arctic_like.trainer.losses import mean_loss, source_losses, token_losses

        labels, source_ids = batch["labels"], batch.get("source_ids")
        losses = token_losses(self.logits(batch), labels)
        mean = mean_loss(losses, labels)
        if source_ids is None:
            return mean
        sources = self.equipment.data.sources
        groups = source_losses(losses, labels, source_ids, sources)
        return Loss(mean, groups={f"loss/{name}": pair for name, pair in groups.items()})

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's logits of a batch, (batch, length, vocabulary), in the model's dtype.

        Documents that are packed into one row do not see each other.
        """
        logits: Tensor = self.model(**self.model_inputs(batch)).logits
        return logits.view(*batch["input_ids"].shape, -1)

    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the model is called with: tokens and positions, neither labels nor an attention mask.

        Positions that restart are what isolates packed documents; a mask or a cache would undo it.
        """
        from arctic_like.model.isolation import packed_inputs

        return packed_inputs(self.module, batch["input_ids"], batch["position_ids"])
