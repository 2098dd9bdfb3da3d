"""`causal`: next-token prediction over plain text, and the base of the language-model trainers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.loss import Loss
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.kernels.tiles import Head
    from arctic_like.model.heads import LinearHead

PLACES = "trained_places"
"""In a batch on a GPU: where this rank's `targets` are trained, as the host found it."""
BORDERS = "borders"
"""In a batch of rows that ranks share: where their documents end (`sequence.borders_of`)."""


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
    shares_sequences: ClassVar[bool] = True
    divides_models: ClassVar[bool] = True

    def loss(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """Mean over `weight(batch)` trained labels of -log p(next token); where the batch says which
        source each token is from, also each source's own (`loss/<source>`)."""
        from arctic_like.trainer.losses import source_losses

        labels, source_ids = batch["labels"], batch.get("source_ids")
        mean, losses = self._mean_and_losses(batch)
        if source_ids is None:
            return mean
        sources = self.equipment.data.sources
        groups = source_losses(self.of_rows(losses, batch), labels, source_ids, sources)
        return Loss(mean, groups={f"loss/{name}": pair for name, pair in groups.items()})

    def _mean_and_losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(mean over trained labels, with gradient; the losses of this rank's tokens, (tokens,)).

        Through the head by itself, whose full logits then never exist, where that is known to be exact.
        """
        from arctic_like.kernels.linear_loss import IGNORE, linear_cross_entropy_sum
        from arctic_like.model.heads import through_head
        from arctic_like.trainer.losses import target_losses

        targets = self.targets(batch["labels"])
        count = (batch["labels"][:, 1:] != IGNORE).sum().clamp(min=1)
        if self._head is None:
            own = target_losses(self.logits(batch), targets.view(batch["input_ids"].shape))
            return self.sequence.sum(own.sum()) / count, own.flatten()

        def compute(hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
            found = linear_cross_entropy_sum(
                hidden, head.weight, targets, bias=head.bias, softcap=head.softcap,
                scale=head.scale, low=head.low, places=batch.get(PLACES),
            )  # fmt: skip
            return found.total, found.losses

        inputs = self.model_inputs(batch)
        total, losses = through_head(self._head, lambda: self.model(**inputs), compute)
        return self.sequence.sum(total) / count, losses

    # Rows that several ranks share. Where none do, a rank's part is the whole.

    def targets(self, labels: Tensor) -> Tensor:
        """What this rank's tokens are to predict, (rows · part,) int64, from labels of whole rows (rows,
        length): the label of the next place, which may be in another rank's part."""
        from arctic_like.kernels.linear_loss import next_tokens

        return self.sequence.part(next_tokens(labels).view(labels.shape)).flatten()

    def of_rows(self, of_tokens: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Values of this rank's tokens as those of the whole rows' `labels[:, 1:]`: from rows · part numbers
        (rows, length - 1), differentiable. Collective."""
        return self.sequence.whole(of_tokens.view(batch["input_ids"].shape))[:, :-1]

    @cached_property
    def _head(self) -> LinearHead | None:
        """The model's head; None where it cannot be called by itself, or `logits` is a subclass's own.

        Found at the first loss, which all ranks compute together.
        """
        from loguru import logger

        from arctic_like.model.heads import find_head

        if type(self).logits is not CausalTrainer.logits or "logits" in vars(self):
            return None
        found = find_head(self.module, device=self.device)
        if found.head is None:
            logger.info(f"the loss takes the model's full logits: {found.reason}")
        return found.head

    def to_device(self, batch: Any) -> Any:
        """Nested tensors moved to the device. A batch also says where its targets are trained and where its
        documents begin, found here, on the host: the head and the attention would have to wait for the device
        to know how many there are.

        Where ranks share rows, `input_ids` and `position_ids` are this rank's part; everything else is of
        the whole rows, on every rank.
        """
        from arctic_like.sequence.rows import borders_of, padded

        known = isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys()
        shared = known and self.sequence.size > 1
        if shared:
            batch = padded(batch, self.sequence.size)
            batch[BORDERS] = borders_of(batch["position_ids"], batch["labels"])
        if known:
            from arctic_like.kernels.linear_loss import IGNORE

            trained = self.targets(batch["labels"]) != IGNORE
            batch = {**batch, PLACES: trained.nonzero().squeeze(1)}
            if not shared and "position_ids" in batch:
                batch[BORDERS] = borders_of(batch["position_ids"])
        moved = super().to_device(batch)
        if shared:
            own = {name: self.sequence.part(moved[name]) for name in ("input_ids", "position_ids")}
            return {**moved, **own}
        return moved

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's logits of this rank's tokens, (batch, length, vocabulary), in the model's dtype.

        Documents that are packed into one row do not see each other.
        """
        logits: Tensor = self.model(**self.model_inputs(batch)).logits
        return logits.view(*batch["input_ids"].shape, -1)

    def model_inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """What the model is called with: tokens and positions, neither labels nor an attention mask.

        Positions that restart are what isolates packed documents; a mask or a cache would undo it.
        """
        return self.inputs_of(self.module, batch)

    def inputs_of(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """As `model_inputs`, of any learner's plain model."""
        from arctic_like.model.isolation import packed_inputs

        places = batch["input_ids"], batch["position_ids"]
        if self.sequence.size == 1:
            return packed_inputs(module, *places, borders=batch.get(BORDERS))
        from arctic_like.model.sequence import shared_inputs

        return shared_inputs(module, *places, batch[BORDERS])
