"""`orpo`: the likelihood of chosen answers and the odds ratio to the rejected ones, without a reference."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanFloat
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.preference import PreferenceTrainer
from arctic_like.trainer.preference_config import PreferenceConfig


class ORPOConfig(PreferenceConfig):
    """A recipe of `type: orpo`."""

    type: str = "orpo"
    """The trainer: likelihood and odds ratio in one stage."""

    beta: Annotated[HumanFloat, Field(gt=0)] = 0.1
    """Weight of the odds ratio (the paper's λ)."""

    @property
    def mixture(self) -> dict[str, float]:
        """One loss."""
        return {"orpo": 1.0}


class ORPOTrainer(PreferenceTrainer):
    """Likelihood and odds ratio, without a reference: Hong et al. 2024 (arXiv:2403.07691), eq. 6."""

    name = "orpo"
    config_type: ClassVar[type[TrainerConfig]] = ORPOConfig
