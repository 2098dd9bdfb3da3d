"""`cpo`: contrast and likelihood of whole answers, without a reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.preference import PreferenceTrainer
from arctic_like.trainer.preference_config import PreferenceConfig, raise_problems

_LOSSES = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo"}


class CPOConfig(PreferenceConfig):
    """A recipe of `type: cpo`."""

    type: str = "cpo"
    """The trainer: contrast and likelihood."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """How the two log-probabilities are compared."""

    label_smoothing: Annotated[HumanFloat, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's labels are swapped."""

    nll_weight: Annotated[HumanFloat, Field(ge=0)] = 1.0
    """Weight of the chosen answer's likelihood (TRL's `cpo_alpha`)."""

    @property
    def mixture(self) -> dict[str, float]:
        """One loss."""
        return {_LOSSES[self.loss]: 1.0}

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that the loss takes."""
        return {
            "beta": self.beta, "label_smoothing": self.label_smoothing, "nll_weight": self.nll_weight
        }  # fmt: skip

    @model_validator(mode="after")
    def _smoothed(self) -> Self:
        raise_problems(type(self).__name__, self._problems())
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.label_smoothing and self.loss != "sigmoid":
            yield Problem(f"is {self.label_smoothing}, but {self.loss} does not take it",
                          "label_smoothing", "leave it out, or set loss: sigmoid")  # fmt: skip


class CPOTrainer(PreferenceTrainer):
    """Contrast and likelihood, without a reference: Xu et al. 2024 (arXiv:2401.08417), eq. 3."""

    name = "cpo"
    config_type: ClassVar[type[TrainerConfig]] = CPOConfig
