"""`micro_batch_size: auto`: the size that trains fastest and fits, found out by trying.

The run is built once apart from the run itself, and steps are done with 1, 2, 4, … rows at once, on the
longest samples for memory and on an ordinary global batch for time. The global batch stays, so nothing that
is trained changes but by rounding. What it was tried on is thrown away. A checkpoint knows the size, and a
resume on as many ranks, which share layers and rows as before, takes it from there.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem

if TYPE_CHECKING:
    from arctic_like.recipe import Recipe
    from arctic_like.trainer.assembly import Session
    from arctic_like.trainer.base import Trainer

AUTO = "auto"
TIMED = 32
"""Samples of a group of ranks that one timing goes through: also the most rows that are tried."""
GAIN = 0.97
"""A larger size must take at most this share of the time: it costs memory, and clocks are noisy."""
SPARE = 0.9
"""Share of a device's memory that a size may take, by what smaller ones took."""


def auto_problems(config: Any) -> Iterator[Problem]:
    """Why a size cannot be found by trying, known from the recipe alone."""
    if config.micro_batch_size != AUTO:
        return
    reasons = {
        "global_batch_size is not stated, which must stay whatever the size":
            (config.global_batch_size is None, "state global_batch_size"),
        "gradient_accumulation_steps is stated, which follows from it":
            (config.given("gradient_accumulation_steps"), "leave gradient_accumulation_steps out"),
        "data.max_tokens_per_batch says already how much is computed at once":
            (getattr(config.data, "max_tokens_per_batch", None) is not None, "leave it out"),
        "a stream cannot be looked through": (getattr(config.data, "streaming", False), "state a number"),
        "the loss couples the samples of a micro-batch, and would change with it":
            (getattr(config, "coupling", "") == "micro_batch", "state a number"),
        "another model is asked in advance": (bool(getattr(config, "built_apart", ())), "state a number"),
    }  # fmt: skip
    for reason, (holds, hint) in reasons.items():
        if holds:
            yield Problem(f"is auto, but {reason}", place="micro_batch_size", hint=hint)


def with_rows(recipe: Recipe, session: Session) -> Recipe:
    """The recipe with a number for `auto`: that of the checkpoint, else found by trying. Collective."""
    if recipe.config.micro_batch_size != AUTO:
        return recipe
    from loguru import logger

    rows = _saved(session)
    if rows:
        logger.info(f"micro_batch_size: {rows}, as before")
    else:
        rows = measured(recipe, session)
        session.start_up.lap("micro-batch trials")
    return _stated(recipe, rows)


def _saved(session: Session) -> int:
    """What the checkpoint says, where ranks go on from it that hold as much of model and rows."""
    if session.resume is None:
        return 0
    from arctic_like.trainer.saver import saved_state
    from arctic_like.trainer.trial import ranks_otherwise

    saved: Mapping[str, Any] = saved_state(session.resume)
    otherwise = ranks_otherwise(saved, session.world)
    return 0 if otherwise else int(saved.get("micro_batch_size", 0))


def _stated(recipe: Recipe, rows: int, **more: Any) -> Recipe:
    config = recipe.config.model_copy(update={"micro_batch_size": rows, **more})
    return replace(recipe, config=config)


@dataclass(frozen=True)
class Tried:
    """Of one size. seconds: of the ordinary samples, on the slowest rank. peak, limit: bytes of the
    longest, and what there is, on the fullest rank. resting: what is there between steps, at least."""

    rows: int
    seconds: float
    peak: float
    limit: float
    resting: float


def measured(recipe: Recipe, session: Session) -> int:
    """Try 1, 2, 4, … rows until a larger size does not gain or would not fit. Collective."""
    from loguru import logger

    with _apart(recipe, session) as trainer:
        sizes = _sizes(trainer)
        logger.info(f"micro_batch_size is auto: trying {', '.join(map(str, sizes))}")
        best = choose(
            sizes, lambda rows: _try(trainer, rows), told=lambda one: logger.info(_said(one))
        )
    logger.info(f"micro_batch_size: {best.rows}")
    return best.rows


def choose(
    sizes: list[int], attempt: Callable[[int], Tried], told: Callable[[Tried], None] = lambda _: None
) -> Tried:  # fmt: skip
    """The fastest of `sizes`, ascending: goes on while it gains, and a next size is expected to fit.

    Memory grows with each row as it did with the last; with the first, by all that a step takes at all.
    """
    best = last = attempt(sizes[0])
    told(last)
    below = replace(last, rows=0, peak=last.resting)
    for rows in sizes[1:]:
        slope = max(last.peak - below.peak, 0.0) / (last.rows - below.rows)
        if last.peak + slope * (rows - last.rows) > SPARE * last.limit:
            break
        below, last = last, attempt(rows)
        told(last)
        if last.seconds > GAIN * best.seconds:
            break
        best = last
    return best


def _said(one: Tried) -> str:
    return (
        f"  {one.rows} at once: {one.seconds:.3g} s, {one.peak / 2**30:.2f} of "
        f"{one.limit / 2**30:.1f} GiB"
    )


def _sizes(trainer: Trainer) -> list[int]:
    share = -(-trainer.equipment.info.global_batch_size // trainer.world.data_size)
    most = min(share, TIMED)
    return [rows for rows in (1 << power for power in range(TIMED.bit_length())) if rows <= most]


def _try(trainer: Trainer, rows: int) -> Tried:
    from arctic_like.data.balance import division_of
    from arctic_like.trainer.trial import trial_step

    equipment, world = trainer.equipment, trainer.world
    division = division_of(trainer.config.data, rows)
    equipment.loader = replace(equipment.loader, division=division)
    plan = equipment.plan
    memory = _Memory(trainer.device, world.local_size)
    trial_step(trainer, plan.at(0).samples)
    peak, limit, resting = memory.read()
    ordinary = plan.at(plan.samples_per_epoch).samples[: TIMED * world.data_size]
    seconds = min(trial_step(trainer, ordinary, rounds=None) for _ in range(2))
    found = trainer.session.host.gather((seconds, peak / limit, peak, limit, resting))
    slowest = max(one[0] for one in found)
    _, _, peak, limit, resting = max(found, key=lambda one: one[1])
    return Tried(rows, slowest, peak, limit, resting)


class _Memory:
    """The most that is taken from now on, and what there is for this rank: of the device, or of the
    machine's memory, which its ranks share."""

    def __init__(self, device: str, ranks: int) -> None:
        self._device, self._ranks = device, ranks
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            # what is freed stays with the process: afterwards it would look like what is needed
            self._before = _kibibytes("/proc/self/status")["VmRSS"]

    def read(self) -> tuple[float, float, float]:
        """(bytes at most, bytes there are, bytes between steps)."""
        if self._device.startswith("cuda"):
            import torch

            free, total = torch.cuda.mem_get_info()
            others = total - free - torch.cuda.memory_reserved()
            resting = float(torch.cuda.memory_allocated())
            return float(torch.cuda.max_memory_reserved()), float(total - max(others, 0)), resting
        own = _kibibytes("/proc/self/status")
        there = _kibibytes("/proc/meminfo")["MemAvailable"] / self._ranks
        limit = (own["VmRSS"] + there) * 1024.0
        return own["VmHWM"] * 1024.0, limit, self._before * 1024.0


def _kibibytes(path: str) -> dict[str, int]:
    pairs = (line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return {key: int(value.split()[0]) for key, value in pairs if value.rstrip().endswith("kB")}


@contextmanager
def _apart(recipe: Recipe, session: Session) -> Iterator[Trainer]:
    """The recipe's trainer as it is before its first step, for a time: without callbacks, trackers,
    exports, files, and with the random generators as they were afterwards. Collective."""
    from loguru import logger

    from arctic_like.engine.random_state import preserved
    from arctic_like.rundir import RunDirectory
    from arctic_like.trainer.assembly import assemble
    from arctic_like.trainer.startup import StartUp

    quiet: dict[str, Any] = {"callbacks": [], "trackers": [], "exporters": [], "checkpoint": []}
    tried = _stated(recipe, 1, **quiet)
    with preserved(), tempfile.TemporaryDirectory(prefix="arctic-train-") as folder:
        trainer: Any = tried.trainer(tried.config)
        trainer.session = replace(
            session,
            recipe=tried,
            directory=RunDirectory(Path(folder)),
            resume=None,
            start_up=StartUp(),
        )
        logger.disable("arctic_like")  # the run says it again
        try:
            trainer.equipment = assemble(trainer, trainer.session)
        finally:
            logger.enable("arctic_like")
        trainer.configure()
        try:
            yield trainer
        finally:
            for learner in trainer.learners.values():
                learner.engine.destroy()
            del trainer
            gc.collect()
            if session.world.device.startswith("cuda"):
                import torch

                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
