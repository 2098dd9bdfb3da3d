"""A model with what trains it, built from the same four sections that a recipe has at its top level."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_like.engine.deepspeed import Engine
    from arctic_like.trainer.numbers import Numbers


@dataclass
class Learner:
    """A model with its engine, and with optimizer and scheduler unless it is frozen.

    interval: when the scheduler moves: "step", "epoch" (after its evaluation) or "metric".
    """

    engine: Engine
    optimizer: Any = None
    scheduler: Any = None
    config: Any = None
    interval: str = "step"
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def frozen(self) -> bool:
        """Whether nothing trains it."""
        return self.optimizer is None

    def learning_rates(self) -> dict[str, float]:
        """Name in a line → the learning rate that the next step uses; empty where frozen."""
        if self.frozen:
            return {}
        return {"learning_rate": self.optimizer.param_groups[0]["lr"]}

    def after_step(self) -> None:
        """Move a scheduler that goes by steps."""
        if self.scheduler is not None and self.interval == "step":
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Move a scheduler that goes by epochs."""
        if self.scheduler is not None and self.interval == "epoch":
            self.scheduler.step()

    def after_evaluation(self, results: Mapping[str, float], numbers: Numbers) -> None:
        """Move a scheduler that goes by a metric."""
        if self.scheduler is not None and self.interval == "metric":
            self.scheduler.step(numbers.monitored(results))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """What an evaluation of the model runs inside."""
        yield
