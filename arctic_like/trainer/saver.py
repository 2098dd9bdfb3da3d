"""When checkpoints are due, what goes into them, and how a run is brought back to one."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.checkpoint.layout import RUN_STATE, newest
from arctic_like.checkpoint.retention import Monitored
from arctic_like.errors import CheckpointError
from arctic_like.registry import build
from arctic_like.run_info import supply

if TYPE_CHECKING:
    from arctic_like.run_info import RunInfo
    from arctic_like.trainer.assembly import Session
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.learner import Learner

FORMAT = 2
GRACE = 60.0
"""Seconds that a run which failed waits for a checkpoint that is being written."""


class Saver:
    """The checkpoint engines of a run."""

    def __init__(self, session: Session, config: Any, info: RunInfo) -> None:
        self._session = session
        self._info = info
        self.engines = [build(entry, "checkpoint") for entry in config.checkpoint if entry.enabled]
        self.exports: list[Path] = []
        self._due: list[Any] = []
        self._saved: dict[int, tuple[int, int]] = {}
        self._under_way: dict[Any, Path] = {}

    def folder(self, engine: Any) -> Path:
        """Where an engine's `step-N` folders lie."""
        own = engine.config.output_dir
        return Path(own) if own else self._session.directory.path / engine.folder

    def due(
        self, trainer: Trainer, *, epoch_over: bool = False, at_end: bool = False,
        at_stop: bool = False, on_request: bool = False, is_best: bool = False,
    ) -> bool:  # fmt: skip
        """Whether an engine is due now; `save` then writes with those that are.

        at_stop, on_request, is_best: not with those that have written what is here already.

        At the last step only the end counts, so that the last state is written once, with all that
        follows the step in it.
        """
        last = trainer.global_step >= trainer.training_horizon
        self._due = []
        for engine in self.engines:
            config = engine.config
            if at_stop or on_request or is_best:
                wanted = config.save_best if is_best else engine.resumable
                wanted = wanted and self._saved.get(id(engine)) != trainer.moment
            elif at_end:
                wanted = config.save_end_of_training
            else:
                wanted = engine.due(
                    step=trainer.global_step,
                    epoch=trainer.current_epoch if epoch_over else None,
                ) and not (last and config.save_end_of_training)
            if wanted:
                self._due.append(engine)
        return bool(self._due)

    def save(self, trainer: Trainer) -> None:
        """Write with every engine that is due; the resumable ones last, as they close the books."""
        step = trainer.global_step
        for engine in sorted(self._due, key=lambda engine: engine.resumable):
            directory = self.folder(engine) / f"step-{step}"
            self.settle(trainer)
            trainer.emit("on_checkpoint_start")
            self.write(trainer, engine, directory)
            self._saved[id(engine)] = trainer.moment
            if engine.background is not None:
                self._under_way[engine] = directory
                continue
            if not engine.resumable and directory not in self.exports:
                self.exports.append(directory)
            trainer.emit("on_checkpoint_end", directory)
        self._due = []

    def prepare(self, trainer: Trainer) -> None:
        """After the first step: let the engines make ready for saves of the state as large as it is."""
        engines = {n: lr.engine for n, lr in trained(trainer).items()}

        def rank_state() -> list[Any]:
            return [callback.state_dict() for callback in trainer.equipment.callbacks.all]

        for engine in self.engines:
            engine.prepare(engines=engines, rank_state=rank_state, world=self._session.world)

    def settle(self, trainer: Trainer) -> None:
        """Wait until what was saved is complete, and tell the callbacks. Collective. Raises CheckpointError
        on every rank where a part of it could not be written."""
        for engine, directory in list(self._under_way.items()):
            del self._under_way[engine]
            self._session.host.raise_together(engine.background.join())
            trainer.emit("on_checkpoint_end", directory)

    @property
    def news(self) -> bool:
        """Whether something that this rank writes in the background failed or, on rank zero, is complete:
        then all ranks should `settle`."""
        main = self._session.world.is_main
        return any(
            engine.background.over and (main or engine.background.error is not None)
            for engine in self._under_way
        )

    def give_up(self) -> None:
        """After an error: let what is being written be completed if it can be. Local."""
        for engine in self._under_way:
            engine.background.give_up(after=GRACE)
        self._under_way = {}

    @property
    def saves_best(self) -> bool:
        """Whether an engine wants the best weights."""
        return any(engine.config.save_best for engine in self.engines)

    def write(self, trainer: Trainer, engine: Any, directory: Path) -> None:
        """Write `directory` with one engine. Collective."""
        monitor, step = trainer.numbers.monitor, trainer.global_step
        monitored = Monitored.of(
            monitor.metric, monitor.direction(), trainer.numbers.value_at(step)
        )
        values: dict[str, Any] = {
            "monitored": monitored,
            "directory": directory,
            "module": trainer.module,
            "tokenizer": trainer.tokenizer,
            "engines": {n: lr.engine for n, lr in trained(trainer).items()},
            "host": self._session.host,
            "barrier": self._session.host.barrier,
            "step": step,
        }
        with contextlib.ExitStack() as stack:
            if engine.resumable:
                values |= self._state(trainer)
            else:  # what others load: the weights to use
                for learner in trained(trainer).values():
                    stack.enter_context(learner.evaluating())
                stack.enter_context(trainer.around("around_export"))
            supply(engine.save, self._info, **values)

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        from arctic_like.engine.random_state import random_state

        equipment, session = trainer.equipment, self._session
        run_state = {
            "format": FORMAT,
            "progress": trainer.progress.as_dict(),
            "world_size": session.world.size,
            "sequence_parallel_size": session.world.sequence_parallel_size,
            "tensor_parallel_size": session.world.tensor_parallel_size,
            "zero_stage": trainer.zero_stage,
            "micro_batch_size": self._info.micro_batch_size,
            "global_batch_size": self._info.global_batch_size,
            "samples": equipment.plan.size,
            "longest_first": getattr(equipment.plan, "count", 0),
            "data": equipment.loader.state(trainer.progress.position),
            "total_steps": equipment.total_steps,
            "metrics": equipment.recorder.sync(trainer.global_step),
            "last": trainer.last_values(),
            "recipe": dict(session.recipe.resolved),
        }
        rank_state = {
            "random": random_state(),
            "schedulers": {n: lr.scheduler.state_dict() for n, lr in trained(trainer).items()},
            "step_ledger": equipment.step_ledger.state_dict(),
            "epoch_ledger": equipment.epoch_ledger.state_dict(),
            "callbacks": [(c.name, c.state_dict()) for c in equipment.callbacks.all],
            "objects": {n: o.state_dict() for n, o in trainer.checkpoint_objects.items()},
            "trainer": trainer.get_extra_state(),
        }
        return {
            "run_state": session.host.from_main(run_state),
            "rank_state": rank_state,
            "state_bytes": _state_bytes(trainer),
        }

    def load_weights(self, trainer: Trainer, path: Path) -> None:
        """The main model's weights from an export, a file or a checkpoint. Collective. Raises
        CheckpointError where it cannot be read, RecipeError where no weight fits."""
        from arctic_like.model.transplant import WeightsFromConfig
        from arctic_like.trainer.transplant import transplant

        transplant(trainer.learner().engine, WeightsFromConfig(path=path, strict=True))

    def resumable_engine(self) -> Any:
        """The engine that writes what a run goes on from, None where the recipe has none."""
        return next((engine for engine in self.engines if engine.resumable), None)

    def newest(self) -> Path | None:
        """The newest complete checkpoint that a resume would pick, with one that is being written."""
        for engine in self._under_way:
            engine.background.give_up(after=GRACE)
        found = [newest(self.folder(e)) for e in self.engines if e.resumable]
        return next((path for path in found if path), None)

    def load(self, trainer: Trainer, directory: Path) -> dict[str, Any]:
        """Bring the trainer to what `directory` holds; returns its `run.json`. Collective."""
        engine = self.resumable_engine()
        if engine is None:
            raise CheckpointError(
                f"{directory} cannot be resumed: the recipe has no checkpoint engine that can\n"
                "    add to it: checkpoint: [{type: deepspeed}]"
            )
        return self.read(trainer, engine, directory)

    def read(self, trainer: Trainer, engine: Any, directory: Path) -> dict[str, Any]:
        """`load` with one engine."""
        from arctic_like.checkpoint.deepspeed import same_ranks
        from arctic_like.engine.random_state import set_random_state

        self.settle(trainer)
        saved = saved_state(directory)
        self._saved = {}
        equipment, world = trainer.equipment, self._session.world
        engines = {n: lr.engine for n, lr in trained(trainer).items()}
        states = supply(
            engine.load, self._info, directory=directory, engines=engines, host=self._session.host
        )
        same = same_ranks(saved, world)
        mine = states[world.rank] if same else states[0]
        for name, learner in trained(trainer).items():
            learner.scheduler.load_state_dict(mine["schedulers"][name])
        equipment.loader.take_up(saved.get("data", {}))
        sums = [mine] if same else (states if world.is_main else [])
        equipment.step_ledger.load_state_dict([state["step_ledger"] for state in sums])
        equipment.epoch_ledger.load_state_dict([state["epoch_ledger"] for state in sums])
        _load_callbacks(
            equipment.callbacks.all, [s["callbacks"] for s in states], own=world.rank if same else 0
        )
        for name, thing in trainer.checkpoint_objects.items():
            thing.load_state_dict(_object_state(mine["objects"], name, directory))
        trainer.set_extra_state(mine["trainer"])
        trainer.take_up(saved)
        if same:
            set_random_state(mine["random"])
        return saved


def trained(trainer: Trainer) -> dict[str, Learner]:
    """The learners that checkpoints hold: those that are not frozen."""
    return {name: one for name, one in trainer.equipment.learners.items() if not one.frozen}


def _load_callbacks(callbacks: list[Any], states: list[Any], *, own: int) -> None:
    """Give each callback its state: the n-th of a name the n-th saved one; a new one begins anew.

    states: of every rank that saved, (name, state) of each callback.
    """
    met: Counter[str] = Counter()
    for callback in callbacks:
        number = met[callback.name]
        met[callback.name] += 1
        found = [[state for name, state in its if name == callback.name] for its in states]
        if all(number < len(its) for its in found):
            callback.load_states([its[number] for its in found], own=own)


def _object_state(states: dict[str, Any], name: str, directory: Path) -> Any:
    if name in states:
        return states[name]
    have = ", ".join(states) or "none"
    raise CheckpointError(
        f"{directory} holds no checkpoint object {name!r}; it holds {have}\n"
        "    put the same names into checkpoint_objects as when it was saved"
    )


def saved_state(directory: Path) -> dict[str, Any]:
    """A checkpoint's `run.json`. Raises CheckpointError where it cannot be read."""
    try:
        saved: dict[str, Any] = json.loads((directory / RUN_STATE).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{directory} is not a checkpoint of a run: {problem}") from problem
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} has format {saved.get('format')}; this version reads {FORMAT}\n"
            "    resume with the version that wrote it, or start anew from an export"
        )
    return saved


def _state_bytes(trainer: Trainer) -> int:
    """About what a checkpoint of all ranks takes: weights, and master weights and two moments in fp32."""
    from arctic_like.engine.divided import whole_shape
    from arctic_like.engine.frozen_base import is_rebuilt

    total = 0
    for learner in trainer.equipment.learners.values():
        rebuilt = is_rebuilt(learner.engine.module)
        for parameter in learner.engine.module.parameters():
            if rebuilt and not parameter.requires_grad:
                continue
            count = math.prod(whole_shape(parameter))
            total += count * (parameter.element_size() + (12 if parameter.requires_grad else 0))
    return total
