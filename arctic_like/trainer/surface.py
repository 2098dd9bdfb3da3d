"""What a run may be asked about: counters, places, and the look-ups between models, optimizers and
schedulers. Read-only; the loop that changes it is in `base.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError
from arctic_like.trainer.progress import Progress

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from arctic_like.data.loader import MicroBatch, StepBatch
    from arctic_like.sequence import SequenceGroup
    from arctic_like.trainer.assembly import Equipment, Session
    from arctic_like.trainer.learner import Learner
    from arctic_like.world import World

MAIN = "model"
"""The name of the learner that the recipe's top-level `model:` describes."""


class Surface:
    """Properties of a Trainer. The names that users of other trainers know are listed in
    docs/coming_from.md."""

    config: Any
    progress: Progress
    session: Session
    equipment: Equipment
    _local_batches: int

    @property
    def world(self) -> World:
        """Ranks and this process's place among them."""
        return self.session.world

    @property
    def sequence(self) -> SequenceGroup:
        """This rank among those that share its rows, and what they exchange (`arctic_like.sequence`)."""
        return self.session.sequence

    @property
    def device(self) -> str:
        """Torch device string of this rank."""
        return self.world.device

    @property
    def global_step(self) -> int:
        """Optimizer steps done, before a resume included."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        """Whole epochs done; during an epoch its number, from 0."""
        return self.progress.position // self.equipment.plan.samples_per_epoch

    @property
    def local_batches(self) -> int:
        """Micro-batches of this rank in the steps done since this start or resume; not saved."""
        return self._local_batches

    @property
    def epochs(self) -> float:
        """Passes over the training data that the run makes (a fraction with `train_iters`)."""
        return self.training_horizon / self.equipment.plan.batches_per_epoch

    @property
    def training_horizon(self) -> int:
        """Optimizer steps of the whole run; the learning-rate schedule covers exactly these."""
        return self.equipment.total_steps

    @property
    def max_steps(self) -> int:
        """Another name of `training_horizon`."""
        return self.training_horizon

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps in which the learning rate rises."""
        return self.equipment.warmup_steps

    @property
    def is_done(self) -> bool:
        """Whether no further step follows."""
        return bool(self.progress.stopped) or self.global_step >= self.training_horizon

    # --- learners

    @property
    def learners(self) -> Mapping[str, Learner]:
        """Name → model with what trains it; "model" is the recipe's own, the others those that the
        trainer's config names."""
        return self.equipment.learners

    def learner(self, name: str = MAIN) -> Learner:
        """One learner. Raises RunError naming those that there are."""
        try:
            return self.equipment.learners[name]
        except KeyError:
            have = ", ".join(self.equipment.learners)
            raise RunError(f"there is no learner {name!r}; this run has {have}") from None

    @property
    def model(self) -> Any:
        """The model to call in `loss`: the DeepSpeed engine around `module`."""
        return self.equipment.learners[MAIN].engine.engine

    @property
    def module(self) -> nn.Module:
        """The plain model, without the engine around it."""
        return self.equipment.learners[MAIN].engine.module

    @property
    def optimizer(self) -> Optimizer:
        """The main model's optimizer, without DeepSpeed's wrapper."""
        optimizer: Optimizer = self.equipment.learners[MAIN].optimizer
        return optimizer

    @property
    def scheduler(self) -> Any:
        """The main model's learning-rate scheduler."""
        return self.equipment.learners[MAIN].scheduler

    def get_module(self, name: str = MAIN) -> nn.Module:
        """The plain model of a learner, or what is below it: `critic.encoder.0`. Raises RunError."""
        learner, _, below = name.partition(".")
        module: nn.Module = self.learner(learner).engine.module
        try:
            return module.get_submodule(below)
        except AttributeError as error:
            raise RunError(f"learner {learner!r} has no module {below!r}: {error}") from None

    def get_optimizer(self, name: str = MAIN) -> Any:
        """The optimizer of a learner. Raises RunError where it is frozen."""
        return self._trained(name).optimizer

    def get_scheduler(self, name: str = MAIN) -> Any:
        """The scheduler of a learner. Raises RunError where it is frozen."""
        return self._trained(name).scheduler

    def _trained(self, name: str) -> Learner:
        learner = self.learner(name)
        if learner.frozen:
            raise RunError(f"learner {name!r} is frozen: it has no optimizer and no scheduler")
        return learner

    @property
    def named_models(self) -> dict[str, nn.Module]:
        """Learner → its plain model."""
        return {name: one.engine.module for name, one in self.learners.items()}

    @property
    def named_optimizers(self) -> dict[str, Any]:
        """Learner → its optimizer; frozen learners have none."""
        return {n: one.optimizer for n, one in self.learners.items() if one.optimizer is not None}

    @property
    def named_schedulers(self) -> dict[str, Any]:
        """Learner → its scheduler; frozen learners have none."""
        return {n: one.scheduler for n, one in self.learners.items() if one.scheduler is not None}

    def name_of(self, part: Any) -> str:
        """The learner that a model, optimizer or scheduler belongs to. Raises RunError for a
        stranger."""
        for name, one in self.learners.items():
            owned = (one.engine, one.engine.engine, one.engine.module, one.optimizer, one.scheduler)
            if part is not None and any(part is own for own in owned):
                return name
        raise RunError(f"{type(part).__name__} belongs to no learner of this run")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the recipe names."""
        return self.equipment.tokenizer

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the main model's engine, 0 to 3."""
        return self.equipment.learners[MAIN].engine.zero_stage

    # --- data

    @property
    def train_dataloader(self) -> Iterator[StepBatch]:
        """The global batches from here on, this rank's part of each; endless. Another name of
        `train_batches`."""
        return self.train_batches

    @property
    def train_batches(self) -> Iterator[StepBatch]:
        """The global batches from here on, this rank's part of each; endless."""
        raise NotImplementedError

    @property
    def val_dataloader(self) -> dict[str, Iterator[MicroBatch]]:
        """Evaluation set → this rank's micro-batches of it, each sample once over all ranks."""
        return dict(self.equipment.evaluation_batches())

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the data publishes: samples, tokens, `scene_radius` … by name."""
        return self.equipment.data.facts
