"""`sft`: supervised fine-tuning on conversations; the assistant's tokens are trained."""

from __future__ import annotations

from typing import Any, ClassVar

from arctic_like.trainer.causal import CausalTrainer
from arctic_like.trainer.config import TrainerConfig


class SFTConfig(TrainerConfig):
    """A recipe of `type: sft`."""

    type: str = "sft"
    """The trainer: the assistant's turns of conversations are trained."""


class SFTTrainer(CausalTrainer):
    """Like `causal`, on conversations: labels outside the assistant's turns are not trained."""

    name = "sft"
    config_type: ClassVar[type[TrainerConfig]] = SFTConfig
    data_factory_type: ClassVar[Any] = ("sft", "causal")
