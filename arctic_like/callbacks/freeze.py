"""Parameters that do not move for a part of the run, exactly, at every ZeRO stage."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import wrong
from arctic_like.config.interval import Interval
from arctic_like.config.values import OneOrMany
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.engine.deepspeed import Engine
    from arctic_like.trainer.base import Trainer


class FreezeConfig(CallbackConfig):
    """`type: freeze`."""

    type: str = "freeze"

    match: Annotated[list[str], OneOrMany(), Field(min_length=1)]
    """Regular expressions, looked for in the names of parameters."""

    after: Interval = Interval()
    """Freeze after so much of the run: `100` (steps), `1 epoch`, `5%`; from the first step unless given."""

    until: Interval = Interval()
    """Train again after so much of the run; never unless given."""

    learner: str = "model"
    """Which learner's parameters."""

    @field_validator("match", mode="after")
    @classmethod
    def _patterns(cls, match: list[str]) -> list[str]:
        for pattern in match:
            try:
                re.compile(pattern)
            except re.error as error:
                raise wrong(f"has {pattern!r}, which is no regular expression: {error}") from None
        return match

    @field_validator("after", "until", mode="after")
    @classmethod
    def _counted(cls, value: Interval) -> Interval:
        if value.unit == "seconds":
            raise wrong(f"is {value}, a time", hint="write 1000 (steps), 1 epoch or 10%")
        return value


class Freeze(Callback):
    """`type: freeze`: neither gradient, momentum nor weight decay moves the matched parameters; their
    optimizer state rests too, except that counts of steps (Adam's bias correction) go on.

    ZeRO updates parameters of a group as one tensor, so that `requires_grad` cannot be switched under it.
    Instead their gradients are zero, which keeps them out of the norm that clips the others, and what the
    update did to them is undone to the bit. That saves no time, and takes the memory of a copy of what is
    frozen during the update: what is never trained is better left out by the model's config.
    """

    name = "freeze"
    config_type: ClassVar[type[CallbackConfig]] = FreezeConfig
    config: FreezeConfig

    def __init__(self, config: FreezeConfig) -> None:
        super().__init__(config)
        self._names: list[str] = []
        self._first, self._end = 0, math.inf
        self._kept: dict[tuple[int, Any, int], Tensor] = {}

    def on_setup_end(self, trainer: Trainer) -> None:
        """Find the parameters. Raises RecipeError for a pattern without one, or an empty time."""
        learner = trainer.learner(self.config.learner)
        if learner.frozen:
            raise _wrong(
                f"is {self.config.learner!r}, which is never trained", "learner", "name another"
            )
        names = list(learner.engine.trained(frozen_too=True))
        for number, pattern in enumerate(self.config.match):
            if not any(re.search(pattern, name) for name in names):
                raise _wrong(f"is {pattern!r}, which no trained parameter's name contains",
                             f"match.{number}", f"there are {', '.join(names[:6])}, …")  # fmt: skip
        self._names = [n for n in names if any(re.search(p, n) for p in self.config.match)]
        self._first = _steps(self.config.after, trainer)
        self._end = _steps(self.config.until, trainer) if self.config.until else math.inf
        if self._first >= self._end:
            raise _wrong(f"is {self.config.until}, not later than after ({self.config.after})", "until",
                         "leave it out to freeze to the end")  # fmt: skip

    def is_frozen(self, trainer: Trainer) -> bool:
        """Whether the step under way must not move the parameters."""
        return (
            trainer.updating == self.config.learner
            and self._first <= trainer.global_step < self._end
        )

    def on_gradients_ready(self, trainer: Trainer) -> None:
        """Take their gradients away, before the norm is taken. Collective."""
        if not self.is_frozen(trainer):
            return
        import torch

        from arctic_like.engine.divided import whole_shape

        engine = trainer.learner(self.config.learner).engine
        parameters = engine.trained()
        for name in self._names:
            if name in parameters:
                zeros = torch.zeros(whole_shape(parameters[name]), device=engine.device)
                engine.set_gradients({name: zeros})

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Keep what the update may touch: master weights, the model's own, optimizer states."""
        if self.is_frozen(trainer):
            engine = trainer.learner(self.config.learner).engine
            # a weight of the module may be its master weight, of another shape: one memory, kept once
            places = {_key(p): p for n in self._names for p in places_of(engine, n)}
            self._kept = {key: place.clone() for key, place in places.items()}

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Put it back."""
        if not self.is_frozen(trainer):
            return
        import torch

        engine = trainer.learner(self.config.learner).engine
        if engine.zero_stage == 3:  # whole small weights would outlive the shares they were made of
            engine.engine.optimizer.empty_partition_cache()
        with torch.no_grad():
            for name in self._names:
                for place in places_of(engine, name):
                    kept = self._kept.get(_key(place))
                    # a state that the first update made begins with zeros
                    place.zero_() if kept is None else place.copy_(kept.view(place.shape))
        self._kept = {}


def places_of(engine: Engine, name: str) -> list[Tensor]:
    """Live views of all that an update changes of a parameter on this rank: of what the module holds, of its
    master weights, of every optimizer state with a value per element."""
    import torch

    layout, optimizer = engine.layout, engine.base_optimizer
    parameter = engine.trained(frozen_too=True)[name]
    shard: Any = getattr(parameter, "ds_tensor", parameter)
    where = layout.fragments.get(parameter)
    if where is None or optimizer is None:
        return [shard.detach()]
    flat = layout.flats[where.flat]
    states = optimizer.state.get(flat, {}).items()
    values = [
        v for key, v in states if torch.is_tensor(v) and v.shape == flat.shape and key != "step"
    ]
    whole = where.count == flat.numel()
    return [shard.detach(), *(v.detach() if whole else v.detach().narrow(0, where.offset, where.count)
                              for v in (flat, *values))]  # fmt: skip


def _key(place: Tensor) -> tuple[int, Any, int]:
    return place.data_ptr(), place.dtype, place.numel()


def _steps(interval: Interval, trainer: Trainer) -> int:
    """How many steps that much of the run is, rounded up."""
    if not interval:
        return 0
    return math.ceil(
        interval.period(
            steps_per_epoch=trainer.equipment.plan.batches_per_epoch,
            total_steps=trainer.training_horizon,
        )
    )


def _wrong(message: str, key: str, hint: str) -> RecipeError:
    return RecipeError(Problem(message, f"callbacks.freeze.{key}", hint))
