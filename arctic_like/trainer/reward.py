"""`reward`: a model that scores answers, trained on pairs of a chosen and a rejected one, or on rankings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem
from arctic_like.loss import Loss
from arctic_like.trainer.causal import CausalTrainer
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.preference import DOCUMENTS
from arctic_like.trainer.preference_config import raise_problems

if TYPE_CHECKING:
    from torch import Tensor


class RewardConfig(TrainerConfig):
    """A recipe of `type: reward`."""

    type: str = "reward"
    """The trainer: scores of answers, by pairs or rankings."""

    center_rewards_coefficient: Annotated[HumanFloat, Field(ge=0)] = 0.0
    """Weight of (r_chosen + r_rejected)², which brings rewards to mean 0; 0.01 is usual."""

    ranking_loss: Literal["plackett_luce", "pairwise"] = "plackett_luce"
    """Of `data.type: ranking`: -log of the whole order's probability, or the mean over all pairs in it."""

    @property
    def answers(self) -> int:
        """Answers that are compared with each other: 2 of pairs, else those of a ranking."""
        return int(getattr(self.data, "answers", 2))

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        of_pairs = self.data.type != "ranking"
        for key, wrong in (
            ("ranking_loss", of_pairs),
            ("center_rewards_coefficient", not of_pairs),
        ):
            if wrong and self.given(key):
                what = ("rankings", "pairs") if of_pairs else ("pairs", "rankings")
                problem = Problem(f"is for {what[0]}; the data are {what[1]}", key, "leave it out")
                raise_problems(type(self).__name__, [problem])
        return self

    @model_validator(mode="after")
    def _one_score(self) -> Self:
        labels = getattr(self.model, "num_labels", 1)
        if labels != 1:
            problem = Problem(
                f"is {labels}; a reward is one number", "model.num_labels", "leave it out"
            )
            raise_problems(type(self).__name__, [problem])
        return self


class RewardTrainer(CausalTrainer):
    """The mean over pairs of -log σ(r_chosen - r_rejected - margin): Bradley and Terry 1952, as in Ouyang et
    al. 2022 (arXiv:2203.02155), eq. 1. Of rankings the mean of -log P(order): Plackett 1975 and Luce 1959, as
    in Zhu, Jiao and Jordan 2023 (arXiv:2301.11270), section 4."""

    name = "reward"
    divides_models: ClassVar[bool] = False
    config_type: ClassVar[type[TrainerConfig]] = RewardConfig
    data_factory_type: ClassVar[Any] = ("dpo", "ranking")
    model_factory_type: ClassVar[Any] = ("scoring",)
    weight_unit: ClassVar[str] = "pairs"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.data.type == "ranking":
            self.weight_unit = "rankings"  # type: ignore[misc]  # of this run

    def weight(self, batch: dict[str, Tensor]) -> float:
        """The number of pairs, or of rankings."""
        from arctic_like.methods.logprobs import count_documents

        return float(count_documents(batch["segment_ids"]) // self.config.answers)

    def to_device(self, batch: Any) -> Any:
        """The batch on the device, with the number of its documents."""
        moved = super().to_device(batch)
        if not isinstance(batch, Mapping) or "segment_ids" not in batch:
            return moved
        from arctic_like.methods.logprobs import count_documents

        return {**moved, DOCUMENTS: count_documents(batch["segment_ids"])}

    def rewards(self, batch: dict[str, Any]) -> Tensor:
        """The score of every document, (documents,) in at least float32: chosen and rejected in turn, or the
        answers of each ranking, best first."""
        from arctic_like.model.scoring import document_scores

        scores = document_scores(
            self.logits(batch), batch["segment_ids"], documents=batch[DOCUMENTS]
        )
        return scores[:, 0]

    def loss(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """The mean over pairs, with rewards, their differences and how often the chosen one is higher."""
        from arctic_like.methods.reward import bradley_terry

        rewards = self.rewards(batch)
        if self.config.data.type == "ranking":
            return self._of_rankings(rewards.view(-1, self.config.answers), batch)
        chosen, rejected = rewards[0::2], rewards[1::2]
        losses = bradley_terry(
            chosen, rejected, margin=self._margins(batch, rewards),
            center=self.config.center_rewards_coefficient,
        )  # fmt: skip
        values = {
            "rewards/chosen": chosen.detach().mean(),
            "rewards/rejected": rejected.detach().mean(),
            "rewards/margins": (chosen - rejected).detach().mean(),
            "rewards/accuracies": (chosen > rejected).double().mean(),
        }
        return Loss(losses.mean(), values=values, groups=self._of_sources(losses.detach(), batch))

    def _of_rankings(self, rewards: Tensor, batch: dict[str, Any]) -> Loss:
        """The mean over rankings, with the rewards of the best and the worst answers, how often the best one
        comes first, and how many pairs are in order. rewards: (rankings, K), best first."""
        import torch

        from arctic_like.methods.reward import pairwise, plackett_luce

        whole_order = self.config.ranking_loss == "plackett_luce"
        losses = plackett_luce(rewards) if whole_order else pairwise(rewards)
        seen, count = rewards.detach(), self.config.answers
        better, worse = torch.triu_indices(count, count, offset=1, device=seen.device)
        values = {
            "rewards/best": seen[:, 0].mean(),
            "rewards/worst": seen[:, -1].mean(),
            "rewards/best_first": (seen[:, :1] > seen[:, 1:]).all(1).double().mean(),
            "rewards/accuracies": (seen[:, better] > seen[:, worse]).double().mean(),
        }
        return Loss(losses.mean(), values=values, groups=self._of_sources(losses.detach(), batch))

    def _margins(self, batch: dict[str, Any], rewards: Tensor) -> Tensor | None:
        """(pairs,) where the data has margins (`data.margin`)."""
        import torch

        from arctic_like.methods.logprobs import document_values

        if "margin" not in batch:
            return None
        bits = document_values(batch["margin"], batch["segment_ids"], documents=batch[DOCUMENTS])
        return bits[0::2].view(torch.float64).to(rewards)

    def _of_sources(
        self, losses: Tensor, batch: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Each source's loss, where sources are told apart."""
        from arctic_like.methods.logprobs import document_values

        if "source_ids" not in batch:
            return {}
        segments, sources = batch["segment_ids"], batch["source_ids"]
        of_all = document_values(sources, segments, documents=batch[DOCUMENTS])
        of_pairs = of_all[:: self.config.answers]
        found = {}
        for number, name in enumerate(self.equipment.data.sources):
            mine = (of_pairs == number).double()
            found[f"loss/{name}"] = ((losses * mine).sum(), mine.sum())
        return found
