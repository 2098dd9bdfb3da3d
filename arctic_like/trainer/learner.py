"""A model with what trains it, built from the same four sections that a recipe has at its top level."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_like.engine.deepspeed import Engine
    from arctic_like.engine.host import HostGroup
    from arctic_like.engine.modes import OptimizerModes


@dataclass
class Learner:
    """A model with its engine, and with optimizer and scheduler unless it is frozen.

    scheduler: the `Schedules` of the optimizer's groups, each of which moves at its own time.
    """

    engine: Engine
    optimizer: Any = None
    scheduler: Any = None
    config: Any = None
    modes: OptimizerModes | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def frozen(self) -> bool:
        """Whether nothing trains it."""
        return self.optimizer is None

    def learning_rates(self) -> dict[str, float]:
        """Name in a line → the learning rate that the next step uses; empty where frozen."""
        if self.scheduler is None:
            return {}
        rates: dict[str, float] = self.scheduler.learning_rates()
        return rates

    def after_step(self) -> None:
        """Move schedules that go by steps."""
        if self.scheduler is not None:
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Move schedules that go by epochs."""
        if self.scheduler is not None:
            self.scheduler.after_epoch()

    def after_evaluation(self, results: Mapping[str, float], host: HostGroup) -> None:
        """Move schedules that go by a metric. Collective where there are any."""
        if self.scheduler is not None and self.scheduler.follows_a_metric:
            # a callback may have added a metric on rank zero alone
            self.scheduler.after_evaluation(host.from_main(dict(results)))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """What an evaluation or an export of the model runs inside."""
        with self.modes.evaluating() if self.modes is not None else contextlib.nullcontext():
            yield

    def finish_training(self) -> None:
        """No step follows: a schedule-free optimizer leaves the weights to use."""
        if self.modes is not None:
            self.modes.finish()
