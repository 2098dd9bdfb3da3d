"""`distill`: a student learns from a frozen teacher's distribution over the next token."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError
from arctic_like.loss import Loss
from arctic_like.trainer.causal import PLACES, CausalTrainer
from arctic_like.trainer.config import LearnerConfig, TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.kernels.tiles import Head
    from arctic_like.model.heads import LinearHead

TEACHER = "teacher"


class DistillConfig(TrainerConfig):
    """A recipe of `type: distill`."""

    type: str = "distill"
    """The trainer: a student (`model`) learns from a `teacher`."""

    teacher: LearnerConfig = Field(default_factory=lambda: LearnerConfig(frozen=True))
    """The teacher; frozen. Its `deepspeed` may divide it (stage 3) where the student is whole."""

    temperature: Annotated[HumanFloat, Field(gt=0)] = 1.0
    """Both distributions are softened by it."""

    distill_weight: Annotated[HumanFloat, Field(ge=0, le=1)] = 0.5
    """Share of the teacher's loss; the rest is the labels' cross-entropy."""


class DistillTrainer(CausalTrainer):
    """(1 - w) · cross-entropy + w · T² · KL(teacher ‖ student), over trained tokens.

    Hinton, Vinyals and Dean 2015, section 2: softened by T, and T² because gradients scale with 1 / T².
    """

    name = "distill"
    config_type: ClassVar[type[TrainerConfig]] = DistillConfig
    data_factory_type: ClassVar[Any] = ("sft", "causal")

    def configure(self) -> None:
        """Raises RecipeError where the teacher is trained, or has another vocabulary."""
        teacher = self.learner(TEACHER)
        if not teacher.frozen:
            raise RecipeError(
                Problem(
                    "is false, but a teacher is not trained", "teacher.frozen", "set it to true"
                )
            )
        own, theirs = (_vocabulary(m) for m in (self.module, teacher.engine.module))
        if own != theirs:
            raise RecipeError(
                Problem(
                    f"has {theirs:,} tokens, the student {own:,}: their distributions cannot be compared",
                    "teacher.model",
                    "take a teacher of the same family, or a student with its vocabulary",
                )
            )

    def loss(self, batch: dict[str, Tensor]) -> Loss:
        """The mean over trained tokens; `cross_entropy` and `kl` are logged."""
        if self._head is not None and self._teacher_head is not None:
            return self._tiled_loss(batch, self._head, self._teacher_head)
        import torch
        import torch.nn.functional as F

        from arctic_like.trainer.losses import IGNORE

        targets = batch["labels"][:, 1:]
        trained = targets != IGNORE
        student = self.logits(batch)[:, :-1][trained].float()
        with torch.no_grad():
            teacher = self.teacher_logits(batch)[:, :-1][trained].float()
        count = trained.sum().clamp(min=1)
        cross_entropy = F.cross_entropy(student, targets[trained], reduction="sum") / count
        heat = self.config.temperature
        divergence = F.kl_div(
            F.log_softmax(student / heat, -1), F.log_softmax(teacher / heat, -1),
            log_target=True, reduction="sum",
        ) / count  # fmt: skip
        share = self.config.distill_weight
        return Loss(
            (1 - share) * cross_entropy + share * heat**2 * divergence,
            values={"cross_entropy": cross_entropy.detach(), "kl": divergence.detach()},
        )

    def _tiled_loss(
        self, batch: dict[str, Tensor], head: LinearHead, teacher_head: LinearHead
    ) -> Loss:
        """The same without the full logits of either."""
        import torch

        from arctic_like.kernels.linear_loss import IGNORE, linear_distillation, next_tokens
        from arctic_like.model.heads import gathered, through_head
        from arctic_like.model.isolation import packed_inputs

        engine = self.learner(TEACHER).engine
        inputs = packed_inputs(engine.module, batch["input_ids"], batch["position_ids"])
        with torch.no_grad():
            (softened,) = through_head(teacher_head, lambda: engine(**inputs), lambda h, _: (h,))
        targets, config = next_tokens(batch["labels"]), self.config
        with gathered(teacher_head) as teacher:

            def compute(hidden: Tensor, own: Head) -> tuple[Tensor, ...]:
                found = linear_distillation(
                    hidden, own, softened, teacher, targets, share=config.distill_weight,
                    temperature=config.temperature, places=batch.get(PLACES),
                )  # fmt: skip
                return found.total, found.cross_entropy, found.divergence

            inputs = self.model_inputs(batch)
            total, labels, apart = through_head(head, lambda: self.model(**inputs), compute)
        count = (targets != IGNORE).sum().clamp(min=1)
        return Loss(total / count, values={"cross_entropy": labels / count, "kl": apart / count})

    @cached_property
    def _teacher_head(self) -> LinearHead | None:
        """As `_head`; None where a subclass has teacher's logits of its own."""
        from arctic_like.model.heads import find_head

        if type(self).teacher_logits is not DistillTrainer.teacher_logits:
            return None
        return find_head(self.learner(TEACHER).engine.module, device=self.device).head

    def teacher_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's logits, (batch, length, vocabulary), packed documents apart."""
        from arctic_like.model.isolation import packed_inputs

        engine = self.learner(TEACHER).engine
        inputs = packed_inputs(engine.module, batch["input_ids"], batch["position_ids"])
        logits: Tensor = engine(**inputs).logits
        return logits.view(*batch["input_ids"].shape, -1)


def _vocabulary(module: Any) -> int:
    return int(module.config.vocab_size)
