"""`process_reward`: a model that judges every step of a solution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import model_validator

from arctic_like.errors import Problem
from arctic_like.loss import Loss
from arctic_like.trainer.causal import CausalTrainer
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.preference_config import raise_problems

if TYPE_CHECKING:
    from torch import Tensor


class ProcessRewardConfig(TrainerConfig):
    """A recipe of `type: process_reward`."""

    type: str = "process_reward"
    """The trainer: steps that are right or wrong."""

    @model_validator(mode="after")
    def _two_classes(self) -> Self:
        labels = getattr(self.model, "num_labels", 2)
        if labels != 2:
            message = f"is {labels}; a step is wrong or right"
            problem = Problem(message, "model.num_labels", "leave it out")
            raise_problems(type(self).__name__, [problem])
        return self


class ProcessRewardTrainer(CausalTrainer):
    """The mean over steps of the cross-entropy of wrong (0) and right (1) at a step's last token: Uesato et
    al. 2022 (arXiv:2211.14275), Lightman et al. 2023 (arXiv:2305.20050)."""

    name = "process_reward"
    divides_models: ClassVar[bool] = False
    config_type: ClassVar[type[TrainerConfig]] = ProcessRewardConfig
    data_factory_type: ClassVar[Any] = ("stepwise",)
    model_factory_type: ClassVar[Any] = ("token_scoring",)
    weight_unit: ClassVar[str] = "steps"

    def loss(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """The mean over steps, and how many are judged rightly, of all and of those that are wrong."""
        from arctic_like.methods.reward import IGNORE, step_classes

        labels, logits = batch["labels"], self.logits(batch)
        losses, judged = step_classes(logits, labels), labels != IGNORE
        count = judged.sum().clamp(min=1)
        hits = (logits.detach().argmax(-1) == labels) & judged
        wrong = labels == 0
        groups = {"accuracy/wrong_steps": ((hits & wrong).sum(), wrong.sum())}
        groups |= self._of_sources(losses.detach().double(), judged, batch)
        return Loss(losses.sum() / count, values={"accuracy": hits.sum() / count}, groups=groups)

    def _of_sources(
        self, losses: Tensor, judged: Tensor, batch: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Each source's loss, where sources are told apart."""
        if "source_ids" not in batch:
            return {}
        found = {}
        for number, name in enumerate(self.equipment.data.sources):
            mine = judged & (batch["source_ids"] == number)
            found[f"loss/{name}"] = ((losses * mine).sum(), mine.sum())
        return found
