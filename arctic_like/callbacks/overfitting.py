"""A warning where the model goes on learning its training data and no longer what it is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.callbacks.watching import Watch, WatchConfig, shown
from arctic_like.config.values import HumanFloat, HumanInt

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

GAP = "overfitting_gap"


class OverfittingConfig(WatchConfig):
    """What counts as overfitting."""

    type: str = "overfitting_warning"

    patience: HumanInt = Field(default=3, ge=1)
    """Warn after so many evaluations in a row that are worse than the best one by more than
    `min_delta`, while the train loss is lower than it was then."""

    gap: HumanFloat = Field(default=0.0, ge=0)
    """For a metric that is a loss: warn only if it exceeds the train loss by more than this."""


class OverfittingWarning(Callback):
    """`type: overfitting_warning`: warns once each time it begins; an evaluation that is not worse ends it.

    The train loss is the mean over the steps since the evaluation before, from the train lines. Where the
    metric is a loss, its distance to the train loss is logged as `overfitting_gap` with every evaluation.
    """

    name = "overfitting_warning"
    config_type: ClassVar[type[CallbackConfig]] = OverfittingConfig
    config: OverfittingConfig

    def __init__(self, config: OverfittingConfig) -> None:
        super().__init__(config)
        self._watch = Watch(config)
        self._sum, self._steps, self._line = 0.0, 0, 0
        self._best: float | None = None
        self._best_train: float | None = None
        self._worse = 0
        self._warned = False

    def on_setup_end(self, trainer: Trainer) -> None:
        """Which metric, and that there will be evaluations."""
        self._watch.begin(trainer)

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """`loss` is the mean since the last line."""
        steps = trainer.global_step - self._line
        if "loss" in values and steps > 0:
            self._sum += float(values["loss"]) * steps
            self._steps += steps
        self._line = trainer.global_step

    def on_evaluate_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """Compare with the best evaluation so far."""
        value = self._watch.value(trainer, results)
        if value is None or not self._steps:
            return
        train = self._sum / self._steps
        self._sum, self._steps = 0.0, 0
        gap = value - train
        if self._is_loss:
            results[GAP] = gap
        if self._best is None or self._watch.better(value, self._best):
            self._best, self._best_train, self._worse, self._warned = value, train, 0, False
            return
        assert self._best_train is not None
        worse = self._watch.better(self._best, value) and train < self._best_train
        self._worse = self._worse + 1 if worse else 0
        self._warned = self._warned and worse
        wide = not self._is_loss or gap > self.config.gap
        if self._worse >= self.config.patience and wide and not self._warned:
            self._warned = True
            self._warn(trainer, value, train)

    @property
    def _is_loss(self) -> bool:
        return self._watch.direction == "min" and self._watch.name.rpartition("/")[2] == "loss"

    def _warn(self, trainer: Trainer, value: float, train: float) -> None:
        from loguru import logger

        if trainer.world.is_main:
            logger.warning(
                f"the model overfits at step {trainer.global_step}: {self._watch.name} has been worse than "
                f"its best ({shown(self._best)}) for {self._worse} evaluations and is {shown(value)}, while "
                f"the train loss fell from {shown(self._best_train)} to {shown(train)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last evaluation, the best one, and how long it has been worse."""
        return {"sum": self._sum, "steps": self._steps, "line": self._line, "best": self._best,
                "best_train": self._best_train, "worse": self._worse, "warned": self._warned}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._sum, self._steps, self._line = state["sum"], state["steps"], state["line"]
        self._best, self._best_train = state["best"], state["best_train"]
        self._worse, self._warned = state["worse"], state["warned"]
