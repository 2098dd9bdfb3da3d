"""`simpo`: the mean log-probability of a token as the reward, and a margin, without a reference."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanFloat
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.preference import PreferenceTrainer
from arctic_like.trainer.preference_config import PreferenceConfig


class SimPOConfig(PreferenceConfig):
    """A recipe of `type: simpo`."""

    type: str = "simpo"
    """The trainer: rewards are log-probabilities per token."""

    beta: Annotated[HumanFloat, Field(gt=0)] = 2.0
    """Scale of the reward; 2.0 to 10 in the paper."""

    gamma: HumanFloat = 1.0
    """The margin by which the chosen answer's reward shall be higher; about β / 2 in the paper."""

    shape: HumanFloat = 0.0
    """α of AlphaPO, which bends the reward: (1 - p^-α) / α in place of log p. 0 is SimPO."""

    label_smoothing: Annotated[HumanFloat, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's labels are swapped."""

    nll_weight: Annotated[HumanFloat, Field(ge=0)] = 0.0
    """Weight of the chosen answer's likelihood; above 0 this is CPO-SimPO."""

    @property
    def mixture(self) -> dict[str, float]:
        """One loss."""
        return {"alphapo" if self.shape else "simpo": 1.0}

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that the loss takes."""
        found = {
            "beta": self.beta, "gamma": self.gamma, "label_smoothing": self.label_smoothing,
            "nll_weight": self.nll_weight,
        }  # fmt: skip
        return {**found, "shape": self.shape} if self.shape else found


class SimPOTrainer(PreferenceTrainer):
    """Rewards per token and a margin, without a reference: Meng et al. 2024 (arXiv:2405.14734), eq. 6."""

    name = "simpo"
    config_type: ClassVar[type[TrainerConfig]] = SimPOConfig
