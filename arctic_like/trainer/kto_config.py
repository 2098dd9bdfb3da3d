"""What a recipe of `type: kto` says: how judged answers are compared with a reference."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem
from arctic_like.trainer.coupled import Coupling
from arctic_like.trainer.dpo_config import ReferencedConfig
from arctic_like.trainer.preference_config import raise_problems

_KEY = "kl_answers"


class KTOConfig(ReferencedConfig):
    """A recipe of `type: kto`."""

    type: str = "kto"
    """The trainer: answers that are each wanted or not."""

    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The loss: `kto`, whose baseline is an estimate of the divergence from the reference, or
    `apo_zero_unpaired`, whose baseline is 0."""

    beta: Annotated[HumanFloat, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference model."""

    desirable_weight: Annotated[HumanFloat, Field(ge=0)] = 1.0
    """Weight of the loss of answers that are wanted. Where there are fewer of a kind, a larger weight
    balances them: weight × number should be within 1 to 4/3 of the other kind's."""

    undesirable_weight: Annotated[HumanFloat, Field(ge=0)] = 1.0
    """Weight of the loss of answers that are not."""

    coupling: Coupling = "global_batch"
    """What the baseline of `kto` is the mean over. `micro_batch` is what other programs do; the result then
    depends on how a batch is divided."""

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        self.settle_reference()
        return self

    @model_validator(mode="after")
    def _mismatched_answers(self) -> Self:
        """The data has what the loss needs: not stated, so a recipe that is written out does not say it."""
        data: Any = self.data
        wanted, stated = self.loss == "kto", getattr(data, _KEY, None)
        if stated is None or stated == wanted:
            return self
        if data.given(_KEY):
            message = f"is {str(stated).lower()}, but loss: {self.loss} "
            message += "needs answers of other rows" if wanted else "has no use for them"
            raise_problems(type(self).__name__, [Problem(message, f"data.{_KEY}", "leave it out")])
        made = data.replace(**{_KEY: wanted})
        made.model_fields_set.discard(_KEY)
        self.__dict__["data"] = made
        return self
