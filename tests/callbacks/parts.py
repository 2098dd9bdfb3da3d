"""Parts that follow a script which the recipe states: metrics, spoilt batches, one rank's wishes. Also a
recipe's `code:`."""

from __future__ import annotations

import math
from typing import Any

from arctic_like import SFTTrainer
from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanInt
from arctic_like.trainer.config import TrainerConfig


class ScriptedConfig(CallbackConfig):
    """What each evaluation measures as `eval/score`; "nan" and "none" are welcome."""

    type: str = "test_scripted"
    scores: list[Any] = []


class Scripted(Callback):
    """Measures what the script says; rank zero alone, as some callbacks do."""

    name = "test_scripted"
    config_type = ScriptedConfig
    main_rank_only = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.made = 0

    def on_evaluate_end(self, trainer: Any, results: dict[str, float]) -> None:
        score = self.config.scores[min(self.made, len(self.config.scores) - 1)]
        self.made += 1
        if score != "none":
            results["eval/score"] = float(score)

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


class SpikingConfig(TrainerConfig):
    """Which global batches spoil the training."""

    type: str = "test_spiking"
    bad_positions: list[HumanInt] = []
    bad_factor: Any = 1000.0


class Spiking(SFTTrainer):
    """The loss of some global batches, known by their position in the data, is multiplied."""

    name = "test_spiking"
    config_type = SpikingConfig

    def loss(self, batch: Any) -> Any:
        loss = super().loss(batch)
        if not self.module.training or self.batch is None:
            return loss
        bad = self.batch.global_batch.position in self.config.bad_positions
        return (
            loss * (math.nan if self.config.bad_factor == "nan" else self.config.bad_factor)
            if bad
            else loss
        )


class OneRankConfig(CallbackConfig):
    """At which step which rank does what."""

    type: str = "test_one_rank"
    rank: HumanInt = 1
    step: HumanInt = 3
    do: str = "stop"


class OneRank(Callback):
    """Asks to stop, or breaks, on one rank."""

    name = "test_one_rank"
    config_type = OneRankConfig

    def on_step_end(self, trainer: Any) -> None:
        if trainer.world.rank == self.config.rank and trainer.global_step == self.config.step:
            if self.config.do == "stop":
                trainer.request_stop("enough")
            else:
                raise ZeroDivisionError("a defect in a callback")
