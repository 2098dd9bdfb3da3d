"""A loss or gradient norm that is not finite: found on all ranks alike, named with step and samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from arctic_like.errors import NonFiniteError

if TYPE_CHECKING:
    from arctic_like.data.loader import StepBatch
    from arctic_like.trainer.base import Trainer


def fail_if_not_finite_so_far(trainer: Trainer) -> None:
    """Look at the losses since the epoch began. Waits for the device; collective."""
    means = trainer.equipment.epoch_ledger.read(reset=False)
    for name, value in means.values.items():
        if is_loss(name):
            fail_if_not_finite(trainer, value, what=name)


def is_loss(name: str) -> bool:
    """Whether a ledger's name is a learner's loss: `loss`, `critic/loss`."""
    return name == "loss" or name.endswith("/loss")


def fail_if_not_finite(trainer: Trainer, value: float, *, what: str = "loss") -> None:
    """Raise NonFiniteError with step, samples and ways out; `value` is the same on all ranks."""
    if math.isfinite(value):
        return
    batch, progress = trainer.batch, trainer.progress
    position = batch.global_batch.position if batch else -1
    here = progress.global_step + (0 if position < progress.position else 1)
    step = (trainer.equipment.epoch_ledger.first_bad_step() if is_loss(what) else None) or here
    samples = f"; its samples: {name_samples(trainer, batch)}" if batch and step == here else ""
    newest = trainer.equipment.saver.newest()
    kept = f"The last good checkpoint is {newest}." if newest else "No checkpoint was saved yet."
    raise NonFiniteError(
        f"the {what} of step {step} is {value}{samples}\n"
        f"    Nothing was saved after it. {kept}\n"
        "    Try a lower optimizer.learning_rate or a longer warm-up, look at these samples, "
        "or train in another model.dtype.",
        step=step,
    )


def name_samples(trainer: Trainer, batch: StepBatch) -> str:
    """Where the first samples of a global batch come from."""
    samples = trainer.equipment.loader.samples
    names = [samples.sample_id(int(i)) for i in batch.global_batch.samples[:8]]
    more = len(batch.global_batch.samples) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
