"""What a recipe says of a checkpoint engine, and when a checkpoint is due."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from arctic_like.checkpoint.publish import tidy
from arctic_like.checkpoint.retention import Monitored, Retention
from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.interval import Interval
from arctic_like.config.values import HumanInt, RecipePath
from arctic_like.registry import Part

if TYPE_CHECKING:
    from arctic_like.checkpoint.background import BackgroundSave
    from arctic_like.engine.deepspeed import Engine
    from arctic_like.world import World


class CheckpointConfig(PartConfig):
    """One entry of the recipe's `checkpoint:`."""

    type: str = ""
    """Which checkpoint engine: `deepspeed` (to resume), `huggingface` (to use elsewhere)."""

    output_dir: RecipePath | None = None
    """Where the `step-N` folders are written; by default inside the run directory."""

    enabled: bool = True
    """Whether this engine saves at all."""

    save_every_n_steps: HumanInt = Field(default=0, ge=0)
    """Save after every so many optimizer steps; 0 is off."""

    save_every_n_epochs: HumanInt = Field(default=0, ge=0)
    """Save after every so many epochs; 0 is off."""

    save_end_of_training: bool = False
    """Save after the last step."""

    auto_resume: bool = False
    """Go on from the newest complete checkpoint in the output folder, if there is one."""

    save_best: bool = False
    """Save whenever an evaluation improved `metric_monitor`, at that very step (from the first on)."""

    keep_last: HumanInt | None = Field(default=None, ge=1)
    """How many of the newest to keep; the new one is written before an old one goes. All by default, or
    one where `keep_best` or `keep_every` is given."""

    keep_best: HumanInt = Field(default=1, ge=0)
    """How many to keep for their value of `metric_monitor`, beside the last. Only those count that were
    evaluated at their very step. With 0 even the best one goes when it is old."""

    keep_every: Interval = Interval()
    """Keep the first one saved at or after every `1000` (steps), `1 epoch` or `10%` for good."""

    @field_validator("keep_every")
    @classmethod
    def _counted(cls, value: Interval) -> Interval:
        if value.unit == "seconds":
            raise wrong(f"is {value}, a time", hint="write 1000 (steps), 1 epoch or 10%")
        return value


class CheckpointEngine(Part, family="checkpoint"):
    """Writes checkpoints. Has `save(…)`, and `load(…)` if it is resumable.

    Both receive values by parameter name: `directory` (a `step-N`), `module`, `tokenizer`,
    `engines`, `world`, `host`, `barrier`, `step`, `monitored` (the metric of these weights), and what
    the run's facts hold.
    """

    config_type = CheckpointConfig
    config: CheckpointConfig

    resumable: ClassVar[bool] = False
    """Whether a run can go on from what it writes."""

    folder: ClassVar[str] = "checkpoints"
    """The folder of the run directory that its `step-N` folders lie in."""

    def retention(self, *, steps_per_epoch: int | None, total_steps: int | None) -> Retention:
        """What the config keeps of the saved ones."""
        config = self.config
        every = config.keep_every
        period = every.period(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        chosen = bool(every) or (config.given("keep_best") and config.keep_best > 0)
        last = config.keep_last if config.keep_last is not None or not chosen else 1
        return Retention(last, config.keep_best, period)

    def let_go(
        self, saved: list[Path], monitored: Monitored,
        *, steps_per_epoch: int | None = None, total_steps: int | None = None,
    ) -> None:  # fmt: skip
        """Remove those of the complete `step-N` folders that need not stay (one process).

        To be called when the new one, which is among `saved`, is published.
        """
        retention = self.retention(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        if saved:
            tidy(saved[0].parent, saved, retention, monitored)

    def prepare(
        self, *, engines: dict[str, Engine], rank_state: Callable[[], Any], world: World
    ) -> None:  # fmt: skip
        """Called once after a run's first step, when the state has its size. Local.

        rank_state: gives what of this rank's state is no engine's.
        """

    @property
    def background(self) -> BackgroundSave | None:
        """What this rank is still writing of the last save; None where saves end when they return."""
        return None

    def due(self, *, step: int, epoch: int | None = None) -> bool:
        """Whether to save after optimizer step `step` (from 1).

        epoch: how many epochs are over, where the step ended one; None inside an epoch.
        """
        steps, epochs = self.config.save_every_n_steps, self.config.save_every_n_epochs
        by_step = steps > 0 and step > 0 and step % steps == 0
        by_epoch = epochs > 0 and bool(epoch) and epoch is not None and epoch % epochs == 0
        return self.config.enabled and (by_step or by_epoch)
