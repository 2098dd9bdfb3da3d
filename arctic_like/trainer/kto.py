"""`kto`: answers that are each wanted or not, against a frozen reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.loss import Loss
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.dpo import DPOTrainer
from arctic_like.trainer.kto_config import KTOConfig
from arctic_like.trainer.preference import DOCUMENTS
from arctic_like.trainer.surface import MAIN

if TYPE_CHECKING:
    from torch import Tensor

ROWS = ("judged", "mismatched", "tokens")
"""Columns of `represent`."""
FACTS = ("judged", "mismatched", "desirable", "source")
"""Columns of `facts_of`: the reference's log-probabilities, whether the answer is wanted, where from."""


class KTOTrainer(DPOTrainer):
    """Kahneman-Tversky optimisation: Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7, and APO-zero:
    D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, term by term.

    A sample's documents are, by turns, a judged answer and its prompt with another row's answer
    (`data.kl_answers`). The mean log-ratio of the others over the global batch, at least 0, is the baseline.
    """

    name = "kto"
    config_type: ClassVar[type[TrainerConfig]] = KTOConfig
    config: KTOConfig  # type: ignore[assignment]
    data_factory_type: ClassVar[Any] = ("kto",)
    weight_unit: ClassVar[str] = "answers"
    shares_sequences: ClassVar[bool] = True

    @property
    def ld_alpha(self) -> float | None:
        """Every token counts alike."""
        return None

    @property
    def weighs_pairs(self) -> bool:
        """There are no pairs."""
        return False

    @property
    def couples(self) -> bool:
        """Whether there is a baseline of the batch."""
        return self.config.loss == "kto"

    @property
    def _per_token(self) -> bool:
        return False

    @property
    def _documents_each(self) -> int:
        """Documents of a judged answer."""
        return 2 if getattr(self.config.data, "kl_answers", False) else 1

    def weight(self, batch: dict[str, Tensor]) -> float:
        """The number of judged answers."""
        from arctic_like.methods.logprobs import count_documents

        return float(count_documents(batch["segment_ids"]) // self._documents_each)

    def represent(self, batch: dict[str, Any]) -> Tensor:
        """(answers, 3) float64, `ROWS`; only the judged answer's log-probability has a gradient."""
        import torch

        found = self.answer_sums(batch, self.learner(MAIN))
        judged, mismatched = self._parted(found.logprobs)
        tokens, _ = self._parted(found.tokens.to(judged))
        return torch.stack([judged, mismatched.detach(), tokens], dim=1)

    def facts_of(self, batch: dict[str, Any]) -> Tensor | None:
        """(answers, 3 or 4) float64, `FACTS`; the last where sources are told apart."""
        import torch

        from arctic_like.methods.logprobs import document_values

        with torch.no_grad():
            reference = self.reference_sums(batch)
        assert reference is not None
        columns = list(self._parted(reference))
        for name in ("desirable", "source_ids"):
            if name in batch:
                segments, documents = batch["segment_ids"], batch[DOCUMENTS]
                values = document_values(batch[name], segments, documents=documents)
                columns.append(self._parted(values.double())[0])
        return torch.stack(columns, dim=1)

    def _parted(self, of_documents: Tensor) -> tuple[Tensor, Tensor]:
        """(of judged answers, of mismatched ones or zeros where there are none)."""
        import torch

        if self._documents_each == 2:
            return of_documents[0::2], of_documents[1::2]
        return of_documents, torch.zeros_like(of_documents)

    def coupled_loss(self, rows: Tensor, facts: Tensor | None) -> Loss:
        """The mean over these answers, with what is logged of them."""
        from arctic_like.methods import unpaired

        assert facts is not None
        config, wanted = self.config, facts[:, 2] > 0
        ratios = rows[:, 0] - facts[:, 0]
        weights = {
            "desirable_weight": config.desirable_weight,
            "undesirable_weight": config.undesirable_weight,
        }
        if config.loss == "kto":
            baseline = unpaired.kl_baseline(rows[:, 1] - facts[:, 1])
            losses = unpaired.kto(ratios, wanted, beta=config.beta, baseline=baseline, **weights)
            values = {"kl": baseline}
        else:
            losses = unpaired.apo_zero_unpaired(ratios, wanted, beta=config.beta, **weights)
            values = {}
        groups = self._of_kinds(rows, facts) | self._by_source(losses.detach(), facts)
        return Loss(losses.mean(), values=values, groups=groups)

    def row_values(self, rows: Tensor, facts: Tensor | None) -> dict[str, Any]:
        """The same of an evaluation's batch, without loss and baseline."""
        assert facts is not None
        return {
            name: (total / over.clamp(min=1), over)
            for name, (total, over) in self._of_kinds(rows, facts).items()
        }

    def _of_kinds(self, rows: Tensor, facts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums over the wanted and over the other answers, with their numbers."""
        judged = rows[:, 0].detach()
        rewards, found = self.config.beta * (judged - facts[:, 0]), {}
        wanted = (facts[:, 2] > 0).double()
        for kind, mine in (("desirable", wanted), ("undesirable", 1 - wanted)):
            found[f"rewards/{kind}"] = ((rewards * mine).sum(), mine.sum())
            found[f"logps/{kind}"] = ((judged * mine).sum(), mine.sum())
        return found

    def _by_source(self, losses: Tensor, facts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return self._of_sources(losses, facts[:, 3]) if facts.shape[1] == len(FACTS) else {}
