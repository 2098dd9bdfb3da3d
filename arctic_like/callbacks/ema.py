"""An exponential moving average of the weights: evaluated, exported and resumed in place of the last ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.engine.deepspeed import Engine
    from arctic_like.trainer.base import Trainer


class EMAConfig(CallbackConfig):
    """`type: ema`."""

    type: str = "ema"

    decay: Annotated[HumanFloat, Field(ge=0, lt=1)] = 0.999
    """Share of the old average in the new one, once warmed up."""

    warmup: bool = True
    """Begin with a shorter memory: the decay of update t is min(decay, (1 + t) / (10 + t))."""

    every_n_steps: HumanInt = Field(default=1, ge=1)
    """Take the weights in after every so many steps."""

    start_step: HumanInt = Field(default=0, ge=0)
    """Follow the weights as they are up to this step, and average from there."""

    evaluate: bool = True
    """Evaluate and test with the average."""

    export: bool = True
    """Give the average to exporters and to the `huggingface` checkpoint engine."""

    learner: str = "model"
    """Which learner's weights."""


class EMA(Callback):
    """`type: ema`: an average of the fp32 master weights, of which each rank keeps its own part.

    average ← d · average + (1 - d) · weights, after the optimizer step. The warm-up is that of
    TensorFlow's `tf.train.ExponentialMovingAverage(num_updates)`; t counts the updates before, from 0.
    Buffers (batch normalisation's statistics) are the model's own.
    """

    name = "ema"
    config_type = EMAConfig
    needs_whole_layers = True
    config: EMAConfig

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        self.updates = 0
        """How often the weights were taken in."""
        self._engine: Engine | None = None
        self._average: list[Tensor] | None = None
        """Laid out as `Engine.partitions()`; None before the first use."""
        self._saved: list[dict[str, Any]] | None = None
        """States that were loaded and not put in place yet: the engine was not there, or had other shapes."""
        self._wholes: dict[str, Tensor] = {}

    def on_setup_end(self, trainer: Trainer) -> None:
        """Begin with the weights, or with what a checkpoint held."""
        learner = trainer.learner(self.config.learner)
        if learner.frozen:
            raise _refused(
                f"is {self.config.learner!r}, which is not trained", "learner", "name another"
            )
        if all(callable(getattr(learner.optimizer, name, None)) for name in ("train", "eval")):
            raise _refused(
                f"averages the weights, and so does {type(learner.optimizer).__name__}",
                "", "take it out of `callbacks`, or take another optimizer",
            )  # fmt: skip
        self._engine = learner.engine
        self.average()

    def average(self) -> list[Tensor]:
        """This rank's part of the average, fp32, laid out as `Engine.partitions()`; live tensors.

        Raises RunError where shapes were changed without the trainer's knowledge.
        """
        engine = self._engine
        assert engine is not None, "made in on_setup_end"
        if self._average is None:
            self._average = [flat.clone() for flat in engine.partitions()]
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self._average = [flat.clone() for flat in engine.partitions()]
            self._take_in(engine, saved)
        sizes = [tuple(flat.shape) for flat in engine.layout.flats]
        if [tuple(mine.shape) for mine in self._average] != sizes:
            raise RunError(
                "the weights have other shapes than their average\n"
                "    change shapes through trainer.resize, which tells callbacks"
            )
        return self._average

    def on_step_end(self, trainer: Trainer) -> None:
        """Take the weights in."""
        if trainer.global_step % self.config.every_n_steps:
            return
        import torch

        average = self.average()
        weights = trainer.learner(self.config.learner).engine.partitions()
        with torch.no_grad():
            if trainer.global_step <= self.config.start_step:
                torch._foreach_copy_(average, weights)
                return
            torch._foreach_lerp_(average, weights, 1.0 - self.decay(self.updates))
        self.updates += 1

    def decay(self, updates: int) -> float:
        """The decay of the update that comes after `updates` of them."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + updates) / (10 + updates))

    def around_evaluate(self, trainer: Trainer) -> Any:
        """The average stands in for the weights, if it is to be evaluated."""
        return self.standing_in(trainer) if self.config.evaluate else None

    def around_export(self, trainer: Trainer) -> Any:
        """The average stands in for the weights, if it is to be exported."""
        return self.standing_in(trainer) if self.config.export else None

    def standing_in(self, trainer: Trainer) -> contextlib.AbstractContextManager[None]:
        """A context in which the model has the averaged weights; its own come back to the bit.
        Collective."""
        return trainer.learner(self.config.learner).engine.partition_values(self.average())

    def on_weights_loaded(self, trainer: Trainer, path: Any) -> None:
        """Other weights: an average of the old ones would hide them."""
        if self.config.learner == "model":
            self.updates, self._average, self._saved = 0, None, None

    def on_resize_start(self, trainer: Trainer, learner: str, rows: Mapping[str, Any]) -> None:
        """Keep the average whole, on the host, while the engine is rebuilt."""
        if learner == self.config.learner:
            from arctic_like.engine.access import whole

            engine, average = trainer.learner(learner).engine, self.average()
            trained = engine.trained(frozen_too=True)
            self._wholes = {n: whole(engine, p, average).cpu() for n, p in trained.items()}

    def on_resize_end(self, trainer: Trainer, learner: str, rows: Mapping[str, Any]) -> None:
        """Rows that stayed keep their average; new ones begin with their weights."""
        if learner != self.config.learner:
            return
        import torch

        from arctic_like.engine.access import fill

        engine, wholes = trainer.learner(learner).engine, self._wholes
        self._average = [flat.clone() for flat in engine.partitions()]
        self._wholes = {}
        for name, weight in engine.master_weights():
            full = wholes.pop(name)
            if name in rows:
                keep = rows[name].keep
                kept = full if keep is None else full[keep.detach().cpu()]
                full = torch.cat([kept, weight.cpu()[len(kept) :]])
            fill(engine, dict(engine.module.named_parameters())[name], self._average, full)

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and of each parameter this rank's elements: (first, 1-D fp32)."""
        if self._engine is None:
            return {}
        engine, average = self._engine, self.average()
        if not engine.layout.sharded and engine.host.world.rank:
            return {"updates": self.updates, "pieces": {}}  # rank zero's are all of them
        return {"updates": self.updates, "pieces": dict(_pieces(engine, average))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave on the only rank."""
        self.load_states([state], own=0)

    def load_states(self, states: Sequence[dict[str, Any]], *, own: int) -> None:
        """Take back what all ranks' `state_dict` gave, at any number of ranks."""
        if not states[own]:
            return
        self.updates = states[own]["updates"]
        self._saved = list(states)

    def _take_in(self, engine: Engine, states: Sequence[dict[str, Any]]) -> None:
        assert self._average is not None
        parameters = engine.trained(frozen_too=True)
        for state in states:
            for name, (first, values) in state["pieces"].items():
                if name not in parameters:
                    raise RunError(
                        f"the saved average has {name}, and this model does not train it\n"
                        "    take `ema` out of `callbacks`, or resume with the model that was trained"
                    )
                where = engine.layout.fragments.get(parameters[name])
                piece = engine.layout.piece(parameters[name], self._average)
                if where is None or piece is None:
                    continue
                start = max(first, where.start)
                end = min(first + len(values), where.start + where.count)
                if start < end:
                    piece[start - where.start : end - where.start].copy_(
                        values[start - first : end - first]
                    )


def _pieces(engine: Engine, values: Sequence[Tensor]) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    """Parameter → (number of the first element, copies of this rank's elements)."""
    for name, parameter in engine.trained(frozen_too=True).items():
        where, piece = (
            engine.layout.fragments.get(parameter),
            engine.layout.piece(parameter, values),
        )
        if where is not None and piece is not None:
            yield name, (where.start, piece.detach().cpu().clone())


def _refused(message: str, key: str, hint: str) -> RecipeError:
    return RecipeError(Problem(message, f"callbacks.ema{'.' if key else ''}{key}", hint))
