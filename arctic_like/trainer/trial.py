"""A step that leaves no trace, on the most demanding samples: does it fit, and how long does it take?

A run begins with its longest samples (`data/longest_first.py`), so that what does not fit fails at its first
step. One that goes on from a checkpoint on other ranks or in other micro-batches is past that step: it
tries it again, before the checkpoint is loaded over whatever the trial changed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.data.longest_first import LongestFirst

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arctic_like.trainer.base import Trainer
    from arctic_like.world import World

ROUNDS = 2
"""Micro-batches that say all about memory: the second is computed while gradients of the first are there."""


def try_before_resuming(trainer: Trainer, checkpoint: Path) -> None:
    """Do the run's first step again where the checkpoint is of other ranks (`ranks_otherwise`) or another
    micro-batch size; weights, states and generators are then those of a trial, until it is loaded.
    Collective. Raises what a step raises."""
    from loguru import logger

    from arctic_like.trainer.saver import saved_state

    plan = trainer.equipment.plan
    changed = _divided_otherwise(trainer, saved_state(checkpoint))
    if not changed or not isinstance(plan, LongestFirst):
        return
    logger.info(f"{changed}: the longest samples are tried before the checkpoint is loaded")
    trial_step(trainer, plan.at(0).samples)
    if trainer.device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()


def _divided_otherwise(trainer: Trainer, saved: Mapping[str, Any]) -> str:
    info = trainer.equipment.info
    if otherwise := ranks_otherwise(saved, trainer.world):
        return otherwise
    before = saved.get("micro_batch_size", info.micro_batch_size)
    if before != info.micro_batch_size:
        return f"micro-batches of {info.micro_batch_size} instead of {before}"
    return ""


def ranks_otherwise(saved: Mapping[str, Any], world: World) -> str:
    """What of the ranks a checkpoint was saved with otherwise than it is here, and changes what one of them
    holds: how many there are, how many share layers, how many share rows. Empty where all is as it was."""
    if saved["world_size"] != world.size:
        return f"{world.size} ranks instead of {saved['world_size']}"
    shared = {"layers": "tensor_parallel_size", "rows": "sequence_parallel_size"}
    for what, key in shared.items():
        before, now = saved.get(key, 1), getattr(world, key)
        if before != now:
            return f"{what} shared by {now} {'rank' if now == 1 else 'ranks'} instead of {before}"
    return ""


def trial_step(
    trainer: Trainer, samples: NDArray[Any], *, rounds: int | None = ROUNDS
) -> float:  # fmt: skip
    """One optimizer step over the most demanding micro-batches of some samples, without a line, a
    callback or a count; returns how many seconds it took. Changes weights and states: load or build
    them anew afterwards. Collective.

    rounds: how many micro-batches of each rank; None: all.
    """
    import torch

    from arctic_like.trainer.failures import in_step, out_of_memory

    on_cuda = trainer.device.startswith("cuda")
    batch = trainer.equipment.loader.step_of(samples, rounds=rounds)
    with _silent(trainer), trainer.preserve_random_state():
        micro_batches = trainer._weigh(batch)
        if trainer.progress.stopped:
            return 0.0
        trainer.batch = batch
        start = time.perf_counter()
        try:
            trainer.step(micro_batches)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(trainer, error, f"{in_step(trainer)}, a trial") from error
        if on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    trainer.batch = None
    return seconds


@contextlib.contextmanager
def _silent(trainer: Trainer) -> Iterator[None]:
    """Nothing that a run shows, keeps or counts learns of what is done inside."""
    from arctic_like.callbacks.base import CallbackList
    from arctic_like.metrics.ledger import Ledger

    equipment = trainer.equipment
    own = equipment.callbacks, equipment.step_ledger, equipment.epoch_ledger
    sums = [Ledger(device=trainer.device, host=trainer.session.host) for _ in range(2)]
    equipment.callbacks = CallbackList([], is_main=trainer.world.is_main)
    equipment.step_ledger, equipment.epoch_ledger = sums
    try:
        yield
    finally:
        equipment.callbacks, equipment.step_ledger, equipment.epoch_ledger = own
