"""The lines that a run writes of its steps and epochs, their clock, and when they are due."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from arctic_like.trainer.failures import fail_if_not_finite, is_loss
from arctic_like.trainer.surface import MAIN

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer


class Lines:
    """Of one run: which line was the last, and the time that steps have taken since."""

    def __init__(self) -> None:
        self.last = -1
        """The step of the last train line."""
        self._rates: dict[str, float] = {}
        self._began = time.perf_counter()
        self._since = 0
        self._clocks: dict[str, float] = {}

    def mark(self, trainer: Trainer) -> None:
        """Start the clock of the next train line."""
        self._began, self._since = time.perf_counter(), trainer.global_step
        trainer.phases.start()

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds into the time of steps."""
        self._began += seconds

    def note_rates(self, trainer: Trainer) -> None:
        """Remember the learning rates, which are those that the step used: schedules have yet to move."""
        self._rates = {}
        for name, learner in trainer.learners.items():
            prefix = "" if name == MAIN else f"{name}/"
            self._rates |= {f"{prefix}{key}": r for key, r in learner.learning_rates().items()}

    def due(self, trainer: Trainer, interval: Any, name: str) -> bool:
        """Whether an interval of the recipe is due after this step; `name` tells clocks apart. Ranks
        agree; collective where it is one of time."""
        if not interval:
            return False
        since = 0.0
        if interval.unit == "seconds":
            last = self._clocks.setdefault(name, trainer.session.started)
            since = trainer.session.host.from_main(time.monotonic() - last)
        due = interval.due(
            trainer.global_step,
            steps_per_epoch=trainer.equipment.plan.batches_per_epoch,
            total_steps=trainer.training_horizon,
            seconds_since_last=since,
        )
        if due:
            self._clocks[name] = time.monotonic()
        return bool(due)

    def write_step(self, trainer: Trainer) -> None:
        """The train line. The only place in a step that waits for the device. Raises NonFiniteError."""
        means = trainer.equipment.step_ledger.read()
        norms = {
            ("" if name == MAIN else f"{name}/") + "grad_norm": float(learner.engine.grad_norm)
            for name, learner in trainer.learners.items()
            if not learner.frozen
        }
        steps = trainer.global_step - self._since
        seconds = (time.perf_counter() - self._began) / max(steps, 1)
        phases = trainer.phases.read(steps)
        for name, value in means.values.items():
            if is_loss(name):
                fail_if_not_finite(trainer, value, what=name)
        for name, norm in norms.items():
            fail_if_not_finite(trainer, norm, what=name.replace("grad_norm", "gradient norm"))
        first = {"loss": means.values.pop("loss")} if "loss" in means.values else {}
        unit = trainer.weight_unit
        line = {
            **first,
            **self._rates,
            **norms,
            unit: int(trainer.session.step_weight),
            "samples_seen": trainer.progress.position,
            "step_time": seconds,
            f"{unit}_per_second": means.weight / max(seconds * steps, 1e-9),
            **means.values,
            **phases,
            **{
                f"{unit}/{name.removeprefix('loss/')}": int(count)
                for name, count in means.weights.items()
                if name.startswith("loss/")
            },
        }
        self.last = trainer.global_step
        trainer.emit("on_log", line)
        trainer.log(line, kind="train")
        self.mark(trainer)

    def write_epoch(self, trainer: Trainer) -> None:
        """The epoch's record: mean train loss, learning rate, the evaluation of its last step."""
        means = trainer.equipment.epoch_ledger.read()
        line: dict[str, float] = {}
        for name, value in means.values.items():
            if is_loss(name):
                fail_if_not_finite(trainer, value, what=name)
                line[f"{name.removesuffix('loss')}epoch_train_loss"] = value
        record = {"epoch": float(trainer.current_epoch), "step": float(trainer.global_step), **line}
        record |= {k: v for k, v in self._rates.items() if k.endswith("learning_rate")}
        if trainer.evaluated_at == trainer.global_step:
            record |= {k: v for k, v in trainer.numbers.last.items() if k.startswith("eval/")}
        trainer.numbers.history.append(record)
        for learner in trainer.learners.values():
            learner.after_epoch()
        trainer.log(line, kind="epoch")
