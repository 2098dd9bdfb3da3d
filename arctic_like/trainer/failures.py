"""What ends a run in the middle of a step, told so that something can be done about it.

A loss or gradient norm that is not finite is found on all ranks alike and named with step and samples; memory
that is not there is named with step, rank and shapes.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.errors import NonFiniteError, OutOfMemoryError

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


@contextlib.contextmanager
def memory_errors_told(trainer: Trainer, where: Callable[[Trainer], str]) -> Iterator[None]:
    """Inside, torch's OutOfMemoryError becomes ours. where: what was under way, asked when it happened."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(trainer, error, where(trainer)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's allocator has refused (and not ours, which has been told already)."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def out_of_memory(trainer: Trainer, error: BaseException, where: str) -> OutOfMemoryError:
    """The error that tells the user: where, on which rank, and the allocator's own numbers."""
    world = trainer.session.world
    rank = f" on rank {world.rank} of {world.size}" if world.size > 1 else ""
    said = [f"out of memory {where}{rank}", *str(error).splitlines(), *_allocated(world.device)]
    return OutOfMemoryError("\n    ".join(line.strip() for line in said))


def in_step(trainer: Trainer) -> str:
    """ "in the backward of step 3, micro-batch 1 of 2 (4 x 8,192)"."""
    phase, session = trainer.phases.current, trainer.session
    part = f"the {phase} of " if phase in ("forward", "backward", "optimizer") else ""
    text = f"in {part}step {trainer.progress.global_step + 1}"
    batches = trainer.batch.micro_batches if trainer.batch else []
    if phase == "optimizer" or session.micro_batch >= len(batches):
        return text
    shape = " x ".join(f"{size:,}" for size in _shape(batches[session.micro_batch].data))
    return f"{text}, micro-batch {session.micro_batch + 1} of {len(batches)} ({shape})"


def in_evaluation(trainer: Trainer) -> str:
    """Of an evaluation or a test."""
    return f"in an evaluation after step {trainer.progress.global_step}"


def outside(trainer: Trainer) -> str:
    """Of everything else."""
    if getattr(trainer, "equipment", None) is None:
        return "while the run was set up"
    return f"after step {trainer.progress.global_step}"


def _shape(data: Any) -> tuple[int, ...]:
    """Rows and length of a collated batch: of its token ids, else of its first tensor."""
    from torch.utils._pytree import tree_leaves

    first = [data["input_ids"]] if isinstance(data, Mapping) and "input_ids" in data else []
    shapes = [tuple(leaf.shape) for leaf in tree_leaves([first, data]) if hasattr(leaf, "shape")]
    return next(iter(shapes), ())


def _allocated(device: str) -> list[str]:
    """What torch holds of a GPU."""
    if not device.startswith("cuda"):
        return []
    import torch

    gib = 2**30
    tensors, at_most, reserved = (
        count(device) / gib
        for count in (
            torch.cuda.memory_allocated,
            torch.cuda.max_memory_allocated,
            torch.cuda.memory_reserved,
        )
    )
    return [
        f"tensors had {tensors:.2f} GiB when it was told, {at_most:.2f} GiB at most; "
        f"torch had reserved {reserved:.2f} GiB"
    ]
