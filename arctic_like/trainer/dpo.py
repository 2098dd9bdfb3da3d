"""`dpo`: the keys are declared, so that recipes validate; training comes with the preference methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry.choice import Choice
from arctic_like.trainer.causal import CausalTrainer
from arctic_like.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from arctic_like.trainer.progress import Result


class DPOConfig(TrainerConfig):
    """A recipe of `type: dpo`."""

    type: str = "dpo"
    """The trainer: pairs of a chosen and a rejected answer."""

    ref_model: Annotated[PartConfig, Choice("model")] | None = None
    """The frozen reference model."""

    beta: Annotated[HumanFloat, Field(gt=0)] = 0.1
    """Strength of the pull towards the reference model."""

    label_smoothing: Annotated[HumanFloat, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a pair's labels are swapped."""

    ignore_label_index: HumanInt = -100
    """Label of tokens that are not trained."""


class DPOTrainer(CausalTrainer):
    """Declared; refuses to run until its data path and reference model are built."""

    name = "dpo"
    config_type: ClassVar[type[TrainerConfig]] = DPOConfig
    data_factory_type: ClassVar[Any] = ("dpo",)

    @classmethod
    def refuse(cls) -> list[Problem]:
        """Why a recipe of this type cannot run, said before anything is built."""
        return [
            Problem(
                "is 'dpo', which is declared but not built yet", place="type",
                hint="use sft or causal, or write a trainer of your own (docs/custom_trainer.md)",
            )
        ]  # fmt: skip

    def train(self) -> Result:
        """Refused: see `refuse`."""
        raise RecipeError(self.refuse())
