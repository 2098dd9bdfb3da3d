"""What a recipe says of a checkpoint engine, and when a checkpoint is due."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanInt, RecipePath
from arctic_like.registry import Part


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

    keep_last: HumanInt | None = Field(default=None, ge=1)
    """How many to keep; the new one is written before an old one goes. All by default."""


class CheckpointEngine(Part, family="checkpoint"):
    """Writes checkpoints. Has `save(…)`, and `load(…)` if it is resumable.

    Both receive values by parameter name: `directory` (a `step-N`), `module`, `tokenizer`,
    `engines`, `world`, `host`, `barrier`, `step`, and what the run's facts hold.
    """

    config_type = CheckpointConfig
    config: CheckpointConfig

    resumable: ClassVar[bool] = False
    """Whether a run can go on from what it writes."""

    folder: ClassVar[str] = "checkpoints"
    """The folder of the run directory that its `step-N` folders lie in."""

    def due(self, *, step: int, epoch: int | None = None) -> bool:
        """Whether to save after optimizer step `step` (from 1).

        epoch: how many epochs are over, where the step ended one; None inside an epoch.
        """
        steps, epochs = self.config.save_every_n_steps, self.config.save_every_n_epochs
        by_step = steps > 0 and step > 0 and step % steps == 0
        by_epoch = epochs > 0 and bool(epoch) and epoch is not None and epoch % epochs == 0
        return self.config.enabled and (by_step or by_epoch)
