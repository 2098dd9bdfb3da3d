"""The training ends when an evaluation metric no longer improves, or runs away."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.callbacks.watching import Watch, WatchConfig, shown
from arctic_like.config.base import wrong
from arctic_like.config.interval import Interval
from arctic_like.config.values import HumanFloat, HumanInt

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer


class EarlyStoppingConfig(WatchConfig):
    """When to stop."""

    type: str = "early_stopping"

    patience: HumanInt = Field(default=3, ge=1)
    """Stop after so many evaluations in a row without improvement."""

    warmup: Interval = Interval()
    """Evaluations before this do not count at all, neither as best nor as worse: `100` (steps), `2 epochs`,
    `10%`."""

    warmup_evaluations: HumanInt = Field(default=0, ge=0)
    """So many evaluations from the beginning do not count either."""

    divergence_threshold: HumanFloat | None = None
    """Stop at once where the metric is worse than this."""

    stop_on_non_finite: bool = True
    """Stop at once where the metric is NaN or infinite."""

    @field_validator("warmup")
    @classmethod
    def _counted(cls, value: Interval) -> Interval:
        if value.unit == "seconds":
            raise wrong(f"is {value}, a time", hint="write 100 (steps), 2 epochs or 10%")
        return value


class EarlyStopping(Callback):
    """`type: early_stopping`: concludes the training; exports and tests follow as after the last step.

    `Result.stop_reason` is "early_stopping". Where the metric ran away (a threshold, NaN) it is "diverged",
    and nothing is concluded: no exports. A run that stopped this way stops again when it is resumed,
    unless the recipe now asks for more patience.
    """

    name = "early_stopping"
    config_type: ClassVar[type[CallbackConfig]] = EarlyStoppingConfig
    config: EarlyStoppingConfig

    def __init__(self, config: EarlyStoppingConfig) -> None:
        super().__init__(config)
        self._watch = Watch(config)
        self._best: float | None = None
        self._best_step = 0
        self._waited = 0
        self._evaluations = 0

    def on_setup_end(self, trainer: Trainer) -> None:
        """Which metric, and that there will be evaluations."""
        self._watch.begin(trainer)

    def on_train_start(self, trainer: Trainer) -> None:
        """A resumed run that had waited long enough has nothing left to do."""
        self._conclude(trainer)

    def on_evaluate_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """Count."""
        value = self._watch.value(trainer, results)
        self._evaluations += 1
        if value is None or self._is_warming_up(trainer):
            return
        if reason := self._diverged(value):
            self._say(trainer, reason)
            trainer.request_stop("diverged")
        elif self._watch.better(value, self._best):
            self._best, self._best_step, self._waited = value, trainer.global_step, 0
        else:
            self._waited += 1
            self._conclude(trainer)

    def _conclude(self, trainer: Trainer) -> None:
        if self._waited < self.config.patience:
            return
        delta = f" by more than {self.config.min_delta}" if self.config.min_delta else ""
        self._say(
            trainer,
            f"{self._watch.name} has not improved{delta} in {self._waited} evaluations; its best was "
            f"{shown(self._best)} at step {self._best_step}",
        )
        trainer.request_stop("early_stopping", concludes=True)

    def _diverged(self, value: float) -> str:
        name, limit = self._watch.name, self.config.divergence_threshold
        if self.config.stop_on_non_finite and not math.isfinite(value):
            return f"{name} is {value}"
        below = self._watch.direction == "max"
        if limit is not None and (value < limit if below else value > limit):
            return f"{name} is {shown(value)}, {'below' if below else 'above'} {shown(limit)}"
        return ""

    def _is_warming_up(self, trainer: Trainer) -> bool:
        plan = trainer.equipment.plan
        period = self.config.warmup.period(
            steps_per_epoch=plan.batches_per_epoch, total_steps=trainer.training_horizon
        )
        early = self._evaluations <= self.config.warmup_evaluations
        return early or trainer.global_step < period

    def _say(self, trainer: Trainer, reason: str) -> None:
        from loguru import logger

        if trainer.world.is_main:
            logger.warning(f"early stopping at step {trainer.global_step}: {reason}")

    def state_dict(self) -> dict[str, Any]:
        """The best value, where it was, and the evaluations since."""
        return {"best": self._best, "best_step": self._best_step, "waited": self._waited,
                "evaluations": self._evaluations}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._best, self._best_step = state["best"], state["best_step"]
        self._waited, self._evaluations = state["waited"], state["evaluations"]
