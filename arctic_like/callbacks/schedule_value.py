"""A number that follows a schedule: of the trainer, of the optimizer, of the model's modules."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import wrong
from arctic_like.config.interval import Interval
from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

SHOWN = 12


class ScheduleValueConfig(CallbackConfig):
    """`type: schedule_value`."""

    type: str = "schedule_value"

    target: str
    """What follows the schedule: a number of the trainer's own (`distill_weight`), of the optimizer
    (`optimizer.weight_decay`, `optimizer.betas.0`), or of modules (`module.p` for dropout)."""

    match: str = ""
    """Regular expression: which modules, by name, or which of the recipe's `optimizer.groups`; all that have
    the value unless given."""

    schedule: Literal["linear", "cosine", "exponential", "piecewise"] = "linear"
    """How it goes from `start` to `end`; `piecewise` is linear between `points`."""

    start: HumanFloat | None = None
    """The value at first; the recipe's unless given."""

    end: HumanFloat | None = None
    """The value at last."""

    points: list[tuple[Annotated[HumanFloat, Field(ge=0, le=1)], HumanFloat]] = []
    """For `piecewise`: pairs (share of the time, value), in order; outside of them it stays."""

    after: Interval = Interval()
    """When it begins to move: `100` (steps), `1 epoch`, `5%`; at once unless given."""

    until: Interval = Interval()
    """When it has reached the end; with the run unless given."""

    learner: str = "model"
    """Whose optimizer or modules."""

    @model_validator(mode="after")
    def _complete(self) -> ScheduleValueConfig:
        shares = [share for share, _ in self.points]
        if self.schedule == "piecewise" and (len(shares) < 2 or shares != sorted(set(shares))):
            raise wrong("needs two or more pairs (share, value) with rising shares", place="points",
                        hint="write [[0, 0.1], [0.5, 0.3], [1, 0]]")  # fmt: skip
        if self.schedule != "piecewise" and self.end is None:
            raise wrong("is needed", place="end", hint="say what value it goes to")
        if (
            self.schedule == "exponential"
            and (self.end or 0) * (1 if self.start is None else self.start) <= 0
        ):
            raise wrong("is exponential, which has no way from or to zero, or to the other sign",
                        place="schedule", hint="take linear, or values of one sign")  # fmt: skip
        for name in ("after", "until"):
            if getattr(self, name).unit == "seconds":
                raise wrong("is a time", place=name, hint="write 1000 (steps), 1 epoch or 10%")
        return self


class ScheduleValue(Callback):
    """`type: schedule_value`: sets a number before every step; the train line says it as `schedule/<target>`.

    A function of the step alone, so that a resumed run goes on with the same values. Learning rates have
    schedules of their own (`scheduler`).
    """

    name = "schedule_value"
    config_type: ClassVar[type[CallbackConfig]] = ScheduleValueConfig
    config: ScheduleValueConfig

    def __init__(self, config: ScheduleValueConfig) -> None:
        super().__init__(config)
        self._set: list[Callable[[float], None]] = []
        self._start = 0.0
        self._saved: float | None = None
        self._from = self._until = 0.0
        self._value = math.nan

    def on_setup_end(self, trainer: Trainer) -> None:
        """Find the target. Raises RecipeError with the list of what there is."""
        config = self.config
        owner, _, key = config.target.partition(".")
        if key and owner == "module":
            self._modules(trainer, key)
        elif key and owner == "optimizer":
            self._optimizer(trainer, key)
        else:
            self._trainer(trainer, config.target)
        # after a resume the optimizer has a value on the way already
        self._start = self._start if self._saved is None else self._saved
        self._start = self._start if config.start is None else config.start
        if config.schedule == "exponential" and self._start * (config.end or 0) <= 0:
            raise _wrong(f"is exponential, which has no way from {self._start} to {config.end}",
                         "schedule", "take linear, or state start")  # fmt: skip
        steps = {"steps_per_epoch": trainer.equipment.plan.batches_per_epoch,
                 "total_steps": trainer.training_horizon}  # fmt: skip
        self._from = float(config.after.period(**steps)) if config.after else 0.0
        last = float(trainer.training_horizon - 1)
        self._until = float(config.until.period(**steps)) if config.until else last
        if self._until < self._from:
            raise _wrong(f"is {config.until or 'the end of the run'}, before after ({config.after})",
                         "until", "swap them")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Where it began."""
        return {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._saved, self._value = float(state["start"]), math.nan

    def value(self, step: int) -> float:
        """The value of the step that follows `step` steps."""
        length = self._until - self._from
        share = (step - self._from) / length if length > 0 else float(step >= self._from)
        share = min(max(share, 0.0), 1.0)
        start, end = self._start, self.config.end or 0.0
        if self.config.schedule == "piecewise":
            return _between(self.config.points, share)
        if self.config.schedule == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
        if self.config.schedule == "exponential":
            return float(start * (end / start) ** share)
        return start + (end - start) * share

    def on_step_start(self, trainer: Trainer) -> None:
        """Set it."""
        value = self.value(trainer.global_step)
        if value != self._value:
            for put in self._set:
                put(value)
            self._value = value

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """Say it."""
        values[f"schedule/{self.config.target}"] = self._value

    def _trainer(self, trainer: Trainer, key: str) -> None:
        # what a trainer's own config adds is read when it is used; what all trainers have is built from
        config = trainer.config
        roots = [c for c in type(trainer).__mro__ if getattr(c, "family", "") == "trainer"]
        shared = roots[-1].config_type.model_fields  # type: ignore[attr-defined]
        own = {name for name in type(config).model_fields if name not in shared}
        numbers = {n for n in own if isinstance(getattr(config, n), float)}
        if key not in numbers:
            raise _wrong(f"is {key!r}, which is no number that this run reads as it goes", "target",
                         f"there are {', '.join(self._known(trainer, numbers))}")  # fmt: skip
        self._start = float(getattr(config, key))
        stated = (self.config.start, self.config.end, *(v for _, v in self.config.points))
        for value in (v for v in stated if v is not None):
            try:
                config.replace(**{key: value})
            except ValidationError as error:
                raise _wrong(f"takes {key} to {value}: {error.errors()[0]['msg']}", "end",
                             "stay in its limits") from None  # fmt: skip

        def put(value: float) -> None:
            trainer.config = trainer.config.model_copy(update={key: value})

        self._set.append(put)

    def _optimizer(self, trainer: Trainer, key: str) -> None:
        from arctic_like.optimizer.groups import GROUP

        learner = trainer.learner(self.config.learner)
        name, _, index = key.partition(".")
        groups = [] if learner.frozen else [
            group for group in learner.optimizer.param_groups
            if re.search(self.config.match, group.get(GROUP, ""))
        ]  # fmt: skip
        found = []
        for group in groups:
            value = group.get(name)
            if (
                index
                and isinstance(value, (tuple, list))
                and index.isdigit()
                and int(index) < len(value)
            ):
                found.append((group, float(value[int(index)])))
            elif not index and isinstance(value, float) and name not in ("lr", "initial_lr"):
                found.append((group, value))
        if name == "weight_decay":  # biases and norms have none, and stay so
            found = [pair for pair in found if pair[1]] or found
        if not found:
            hint = f"there are {', '.join(self._known(trainer, set()))}"
            if name in ("lr", "learning_rate"):
                hint = "learning rates follow `scheduler`, or that of a group in optimizer.groups"
            raise _wrong(
                f"is {self.config.target!r}, which no group of the optimizer has", "target", hint
            )
        self._start = found[0][1]
        for group, _ in found:
            self._set.append(_of_group(group, name, int(index) if index else None))

    def _modules(self, trainer: Trainer, key: str) -> None:
        modules = trainer.get_module(self.config.learner).named_modules()
        found = [
            m for name, m in modules
            if re.search(self.config.match, name) and _is_number(vars(m).get(key))
        ]  # fmt: skip
        if not found:
            raise _wrong(f"is {self.config.target!r}, which no module has", "target",
                         f"there are {', '.join(self._known(trainer, set()))}")  # fmt: skip
        self._start = float(getattr(found[0], key))
        for module in found:
            self._set.append(_of_object(module, key))

    def _known(self, trainer: Trainer, numbers: set[str]) -> list[str]:
        """Targets that this run has."""
        known = sorted(numbers)
        learner = trainer.learner(self.config.learner)
        for group in [] if learner.frozen else learner.optimizer.param_groups[:1]:
            for name, value in group.items():
                if isinstance(value, float) and name not in ("lr", "initial_lr"):
                    known.append(f"optimizer.{name}")
                elif isinstance(value, (tuple, list)) and name != "params":
                    known += [f"optimizer.{name}.{i}" for i in range(len(value))]
        names = {
            k for m in learner.engine.module.modules() for k, v in vars(m).items() if _is_number(v)
        }
        return [*known, *(f"module.{name}" for name in sorted(names))][:SHOWN] or ["none"]


def _of_group(group: dict[str, Any], name: str, index: int | None) -> Callable[[float], None]:
    def put(value: float) -> None:
        if index is None:
            group[name] = value
        else:
            values = list(group[name])
            values[index] = value
            group[name] = tuple(values)

    return put


def _of_object(thing: Any, key: str) -> Callable[[float], None]:
    return lambda value: setattr(thing, key, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def _between(points: list[tuple[float, float]], share: float) -> float:
    if share <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if share <= right:
            return low + (high - low) * (share - left) / (right - left)
    return points[-1][1]


def _wrong(message: str, key: str, hint: str) -> RecipeError:
    return RecipeError(Problem(message, f"callbacks.schedule_value.{key}", hint))
