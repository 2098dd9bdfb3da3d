"""What a run goes through: its steps, its tokens and its most demanding micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arctic_like.data.base import PreparedData, SampleSet
    from arctic_like.data.loader import Loader
    from arctic_like.data.order import Plan
    from arctic_like.planning.rehearsal import Prepared

MEASURED = 256
"""Samples that are read for the mean square of a document's length."""


@dataclass(frozen=True)
class Course:
    """steps: optimizer steps of the run. tokens, trained_tokens: of all of them (padding left out).
    squares: Σ L² over documents of L tokens, of all steps. micro_batches: the most demanding first one of a
    step, and, where a step has several, the most demanding later one; collated. rows: (rows, length) of the
    largest. rounds: micro-batches of a rank in a full step."""

    steps: int
    steps_per_epoch: int
    samples: int
    tokens: float
    trained_tokens: float
    squares: float
    micro_batches: list[Any]
    shape: tuple[int, ...]
    global_batch_size: int
    rounds: int


def course_of(config: Any, prepared: Prepared, *, ranks: int) -> Course:
    """Look through the steps of the run in their order. Raises RecipeError as a run would."""
    from pathlib import Path

    from arctic_like.planning.rehearsal import world_of
    from arctic_like.run_info import RunInfo
    from arctic_like.trainer.assembly import batch_sizes, horizon, loader_of

    world = world_of(config, ranks)
    info = RunInfo(
        output_dir=Path(), seed=config.seed, world=world, device="cpu", epochs=config.epochs,
        **batch_sizes(config, world, None),
    )  # fmt: skip
    data = prepared.data
    plan, loader = loader_of(config, info, data)
    steps, _ = horizon(config, plan, data)
    info = replace(info, steps_per_epoch=plan.batches_per_epoch)
    samples: Any = data.train
    demands = _Demands(samples, loader, world.data_size)
    epoch = min(steps, plan.batches_per_epoch)
    sums = _through(plan, samples, demands, epoch)
    full, rest = divmod(steps, max(plan.batches_per_epoch, 1))
    tokens, trained, drawn = (full * one for one in sums) if full else (0.0, 0.0, 0.0)
    if not full:
        tokens, trained, drawn = sums
    elif rest:
        position = full * plan.samples_per_epoch
        more = _through(plan, samples, None, rest, position=position)
        tokens, trained, drawn = tokens + more[0], trained + more[1], drawn + more[2]
    own, squares = _documents(data, samples)
    micro_batches = [_collated(data, samples, rows) for rows in demands.chosen()]
    largest = next(iter(_shapes(micro_batches[0])), ())
    return Course(
        steps, plan.batches_per_epoch, int(drawn), tokens, trained, squares * tokens / max(own, 1),
        micro_batches, largest, info.global_batch_size, demands.rounds,
    )  # fmt: skip


class _Demands:
    """The most demanding micro-batches that were seen, by padded tokens and then by trained ones."""

    def __init__(self, samples: SampleSet, loader: Loader, ranks: int) -> None:
        self.samples, self.loader, self.ranks = samples, loader, ranks
        self.rounds = 0
        self._best: dict[bool, tuple[tuple[float, float], list[int]]] = {}

    def see(self, batch: NDArray[np.int64]) -> None:
        """Divide a global batch and compare its micro-batches."""
        lengths = np.asarray(self.samples.lengths[batch])
        weights = np.asarray(self.samples.weights[batch])
        padded = getattr(self.loader.collate, "padded", None)
        known = lengths if padded is None else padded(lengths)
        place = {int(sample): at for at, sample in enumerate(batch)}
        division = self.loader.division
        for share in division.shares(
            batch, known if division.by_length else None, ranks=self.ranks
        ):
            self.rounds = max(self.rounds, len(share))
            for number, rows in enumerate(share):
                if not rows:
                    continue
                at = [place[row] for row in rows]
                demand = (float(known[at].max() * len(rows)), float(weights[at].sum()))
                later = number > 0
                if later not in self._best or demand > self._best[later][0]:
                    self._best[later] = demand, rows

    def chosen(self) -> list[list[int]]:
        """The samples of the most demanding first one, and of the most demanding later one if any."""
        return [self._best[later][1] for later in (False, True) if later in self._best]


def _through(
    plan: Plan, samples: SampleSet, demands: _Demands | None, count: int, *, position: int = 0
) -> tuple[float, float, float]:
    """(tokens, trained tokens, samples) of `count` global batches from `position` on."""
    tokens = trained = drawn = 0.0
    for _ in range(count):
        batch = plan.at(position)
        chosen = np.asarray(batch.samples)
        tokens += float(np.asarray(samples.lengths[chosen]).sum())
        trained += float(np.asarray(samples.weights[chosen]).sum())
        drawn += len(chosen)
        if demands is not None:
            demands.see(chosen)
        position = batch.next_position
    return tokens, trained, drawn


def _documents(data: PreparedData, samples: Any) -> tuple[float, float]:
    """(Σ L, Σ L²) over the documents of some samples, spread over the set."""
    from arctic_like.callbacks.throughput import documents

    total = squares = 0.0
    count = min(len(samples), MEASURED)
    for number in np.linspace(0, len(samples) - 1, count).astype(int):
        batch = _collated(data, samples, [int(number)])
        if not isinstance(batch, dict):
            return 0.0, 0.0
        own, own_squares = documents(batch)
        total, squares = total + own, squares + own_squares
    return total, squares


def _collated(data: PreparedData, samples: Any, rows: list[int]) -> Any:
    return data.collate([samples[row] for row in rows])


def _shapes(batch: Any) -> list[tuple[int, ...]]:
    from torch.utils._pytree import tree_leaves

    return [tuple(value.shape) for value in tree_leaves(batch) if hasattr(value, "shape")]
