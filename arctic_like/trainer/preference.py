"""What the trainers of pairs have in common: a chosen and a rejected answer, in one forward, isolated.

A trainer's config says which losses are mixed (`mixture`) and with which numbers (`numbers`); the losses are
`arctic_like.methods`. The loss is the mean over the pairs of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.loss import Loss
from arctic_like.methods.preference import LOSSES
from arctic_like.trainer.base import WeightedBatch
from arctic_like.trainer.causal import PLACES, CausalTrainer
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.coupled import CoupledTrainer
from arctic_like.trainer.preference_config import PreferenceConfig
from arctic_like.trainer.surface import MAIN

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.kernels.tiles import Head
    from arctic_like.methods.pairs import Pairs
    from arctic_like.model.heads import LinearHead
    from arctic_like.trainer.learner import Learner

DOCUMENTS = "documents"
"""Key of a batch on the device: how many documents it has, counted on the host."""
COLUMNS = ("chosen", "rejected", "chosen_tokens", "rejected_tokens", "weights")
"""Of `represent`; the last is 1 without weights of pairs."""


@dataclass(frozen=True)
class AnswerSums:
    """logprobs: (documents,) float64, log π(y|x) over trained tokens. tokens: (documents,) int64.
    weights: (documents,) float64 without gradient, WPO's, where the trainer weighs pairs."""

    logprobs: Tensor
    tokens: Tensor
    weights: Tensor | None = None


class PreferenceTrainer(CoupledTrainer, CausalTrainer):
    """The mean over pairs of a mixture of losses, over `data: {type: dpo}`."""

    config_type: ClassVar[type[TrainerConfig]] = PreferenceConfig
    data_factory_type: ClassVar[Any] = ("dpo",)
    weight_unit: ClassVar[str] = "pairs"
    shares_sequences: ClassVar[bool] = True
    _mean_tokens: float | None = None
    """Tokens of a chosen answer, the mean over the global batch of the step under way."""

    # What a trainer of this kind may say otherwise --------------------------------------------------

    @property
    def ld_alpha(self) -> float | None:
        """α of LD-DPO, by which the tokens beyond the shorter answer's length count."""
        return None

    @property
    def weighs_pairs(self) -> bool:
        """Whether pairs are weighted by how likely they are under the policy (WPO)."""
        return False

    def reference_sums(self, batch: dict[str, Any]) -> Tensor | None:
        """(documents,) float64: log-probabilities of the answers under the reference; None without."""
        return None

    # Batches ----------------------------------------------------------------------------------------

    def weight(self, batch: dict[str, Tensor]) -> float:
        """The number of pairs."""
        return float(_documents(batch["segment_ids"]) // 2)

    def to_device(self, batch: Any) -> Any:
        """The batch on the device, with the number of its documents."""
        moved = super().to_device(batch)
        if isinstance(batch, Mapping) and "segment_ids" in batch:
            return {**moved, DOCUMENTS: _documents(batch["segment_ids"])}
        return moved

    def answer_sums(self, batch: dict[str, Any], learner: Learner) -> AnswerSums:
        """Log-probabilities of the batch's answers under a learner, with gradient where it is trained."""
        from arctic_like.methods import logprobs

        labels, segments, documents = batch["labels"], batch["segment_ids"], batch[DOCUMENTS]
        weighs = self.weighs_pairs and not learner.frozen
        # how concentrated the policy is (WPO) is asked of its whole distribution
        head = None if weighs else self._head_of(learner)
        logits = None
        if head is not None:
            of_tokens = self._through(head, batch, learner)
        else:
            logits = self._logits_of(batch, learner)
            targets = self.targets(labels).view(batch["input_ids"].shape)
            of_tokens = self.of_rows(logprobs.target_logprobs(logits, targets), batch)
        found = logprobs.answer_sums(
            of_tokens, labels, segments, documents=documents, ld_alpha=self.ld_alpha
        )
        weights = None
        if weighs and logits is not None:
            concentration = self.of_rows(logprobs.concentration(logits), batch)
            weights = logprobs.answer_weights(
                of_tokens, concentration, labels, segments, documents=documents
            )
        return AnswerSums(found.logprobs, found.tokens, weights)

    def _through(self, head: LinearHead, batch: dict[str, Any], learner: Learner) -> Tensor:
        """(batch, length - 1): log π of the next tokens, 0 where they are not trained; no full logits."""
        from arctic_like.kernels.linear_loss import linear_log_probs
        from arctic_like.model.heads import through_head

        targets = self.targets(batch["labels"])

        def compute(hidden: Tensor, own: Head) -> tuple[Tensor, ...]:
            found = linear_log_probs(
                hidden, own.weight, targets, bias=own.bias, softcap=own.softcap, scale=own.scale,
                low=own.low, places=batch.get(PLACES),
            )  # fmt: skip
            return (found,)

        (found,) = through_head(head, lambda: self._call(batch, learner), compute)
        return self.of_rows(found, batch)

    @cached_property
    def _heads(self) -> dict[int, LinearHead | None]:
        return {}

    def _head_of(self, learner: Learner) -> LinearHead | None:
        """As `_head`, of any learner."""
        if self._is_main(learner):
            return self._head
        if id(learner) not in self._heads:
            from arctic_like.model.heads import find_head

            self._heads[id(learner)] = find_head(learner.engine.module, device=self.device).head
        return self._heads[id(learner)]

    def _logits_of(self, batch: dict[str, Any], learner: Learner) -> Tensor:
        """(batch, length of this rank's part, vocabulary)."""
        if self._is_main(learner):
            return self.logits(batch)
        logits: Tensor = self._call(batch, learner).logits
        return logits.view(*batch["input_ids"].shape, -1)

    def _call(self, batch: dict[str, Any], learner: Learner) -> Any:
        engine = learner.engine
        return engine(**self.inputs_of(engine.module, batch))

    def _is_main(self, learner: Learner) -> bool:
        """Also before there is a main one: a reference may be asked first, and then freed."""
        return hasattr(self, "equipment") and learner is self.learner()

    # The loss ---------------------------------------------------------------------------------------

    @property
    def couples(self) -> bool:
        """Whether a loss of the mixture needs all pairs at once. A likelihood per token does so in an
        evaluation alone: a step learns the number of tokens before its first forward."""
        in_step = "delta" not in self.config.numbers and "bco_pair" in self.config.mixture
        in_step = in_step or any(
            LOSSES[name].coupled and name != "bco_pair" for name in self.config.mixture
        )
        return in_step or (self._per_token and self._mean_tokens is None)

    @property
    def _per_token(self) -> bool:
        taken = {number for name in self.config.mixture for number in LOSSES[name].numbers}
        return "mean_tokens" in taken and self.config.likelihood == "token"

    def step(self, micro_batches: Sequence[WeightedBatch]) -> None:
        """One step; a likelihood per token is told the tokens of the global batch first."""
        if self._per_token and self.coupling == "global_batch":
            tokens = sum(_chosen_tokens(micro.data) for micro in micro_batches if micro.weight)
            (total,) = self.session.host.sum([float(tokens) if self.world.counts else 0.0])
            self._mean_tokens = total / self.session.step_weight
        try:
            super().step(micro_batches)
        finally:
            self._mean_tokens = None

    def represent(self, batch: dict[str, Any]) -> Tensor:
        """(pairs, 5) float64, `COLUMNS`; only log-probabilities have gradients."""
        import torch

        from arctic_like.methods.logprobs import pair_weights

        found = self.answer_sums(batch, self.learner(MAIN))
        tokens = found.tokens.to(found.logprobs)
        weights = torch.ones_like(tokens[0::2])
        if found.weights is not None:
            weights = pair_weights(found.weights)
        logprobs = found.logprobs
        columns = [logprobs[0::2], logprobs[1::2], tokens[0::2], tokens[1::2], weights]
        return torch.stack(columns, dim=1)

    def facts_of(self, batch: dict[str, Any]) -> Tensor | None:
        """(pairs, 0 to 3) float64: the reference's log-probabilities of the chosen and of the rejected
        answer where there is a reference, the source where sources are told apart."""
        import torch

        from arctic_like.methods.logprobs import document_values

        columns = []
        with torch.no_grad():
            reference = self.reference_sums(batch)
        if reference is not None:
            columns += [reference[0::2], reference[1::2]]
        if "source_ids" in batch:
            segments = batch["segment_ids"]
            sources = document_values(batch["source_ids"], segments, documents=batch[DOCUMENTS])
            columns.append(sources[0::2].double())
        return torch.stack(columns, dim=1) if columns else None

    def coupled_loss(self, rows: Tensor, facts: Tensor | None) -> Loss:
        """The mean of the mixture over these pairs, with what is logged of them."""
        from arctic_like.methods.preference import preference_losses

        pairs, sources = _read(rows, facts)
        assert pairs.chosen_tokens is not None
        numbers = dict(self.config.numbers)
        if self._per_token:
            mean = pairs.chosen_tokens.mean() if self._mean_tokens is None else self._mean_tokens
            numbers["mean_tokens"] = mean
        weights = rows[:, 4].detach() if self.weighs_pairs else None
        found = preference_losses(pairs, self.config.mixture, weights=weights, **numbers)
        values = self._values(pairs)
        if len(found.terms) > 1:
            values |= {f"loss/{name}": term.mean() for name, term in found.terms.items()}
        groups = _token_means(pairs) | self._of_sources(found.losses.detach(), sources)
        return Loss(found.losses.mean(), values=values, groups=groups)

    def row_values(self, rows: Tensor, facts: Tensor | None) -> dict[str, Any]:
        """The same of an evaluation's batch, without the losses."""
        pairs, _ = _read(rows, facts)
        groups = {
            name: (total / over.clamp(min=1), over)
            for name, (total, over) in _token_means(pairs).items()
        }
        return {**self._values(pairs), **groups}

    def _values(self, pairs: Pairs) -> dict[str, Tensor]:
        """Means over pairs."""
        from arctic_like.methods.preference import implicit_rewards

        chosen, rejected = implicit_rewards(pairs, self.config.mixture, beta=self.config.beta)
        return {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
            "logps/chosen": pairs.chosen.detach().mean(),
            "logps/rejected": pairs.rejected.detach().mean(),
        }

    def _of_sources(
        self, losses: Tensor, sources: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        if sources is None:
            return {}
        found = {}
        for number, name in enumerate(self.equipment.data.sources):
            mine = (sources == number).double()
            found[f"loss/{name}"] = ((losses * mine).sum(), mine.sum())
        return found


def _read(rows: Tensor, facts: Tensor | None) -> tuple[Pairs, Tensor | None]:
    """(the pairs, the number of each one's source)."""
    from arctic_like.methods.pairs import Pairs

    known = [] if facts is None else list(facts.unbind(1))
    ref_chosen, ref_rejected = known[:2] if len(known) > 1 else (None, None)
    sources = known[-1] if len(known) in (1, 3) else None
    chosen, rejected, chosen_tokens, rejected_tokens, _ = rows.unbind(1)
    tokens = (chosen_tokens.detach(), rejected_tokens.detach())
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *tokens), sources


def _token_means(pairs: Pairs) -> dict[str, tuple[Tensor, Tensor]]:
    """Sums over tokens with their numbers. `kl` is the mean of log π - log π_ref over the tokens of both
    answers: an estimate of KL(π ‖ π_ref) as far as the answers are the policy's own."""
    if pairs.ref_chosen is None or pairs.chosen_tokens is None or pairs.rejected_tokens is None:
        return {}
    chosen, rejected = pairs.ratios()
    total = (chosen.detach() + rejected.detach()).sum()
    return {"kl": (total, (pairs.chosen_tokens + pairs.rejected_tokens).sum())}


def _documents(segment_ids: Tensor) -> int:
    """Documents of a batch on the host; numpy, as it is asked of every micro-batch."""
    return int((segment_ids.numpy().max(axis=1) + 1).sum())


def _chosen_tokens(batch: Mapping[str, Tensor]) -> int:
    """Trained tokens of chosen answers in a batch on the host."""
    from arctic_like.trainer.losses import IGNORE

    labels, segments = batch["labels"].numpy()[:, 1:], batch["segment_ids"].numpy()[:, 1:]
    return int(((labels != IGNORE) & (segments % 2 == 0) & (segments >= 0)).sum())
