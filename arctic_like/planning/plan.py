"""A plan: what a recipe will take on given devices, and how long it will be at it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.planning.course import Course, course_of
from arctic_like.planning.devices import GIB, Device
from arctic_like.planning.rehearsal import Prepared, Rehearsal, rehearse
from arctic_like.planning.timing import EFFICIENCY, StepTime, Work, step_time

if TYPE_CHECKING:
    from arctic_like.recipe import Recipe

CONTEXT = 1 * GIB
"""Of a GPU's memory, what CUDA, its libraries and the allocator's rounding take beside tensors: allowed for,
not computed."""
IN_ORDER = {
    "weights": "the weights",
    "optimizer": "master weights and optimizer states",
    "gradients": "the gradients",
    "communication": "buffers of the communication",
    "checkpoint": "the copy of an asynchronous checkpoint",
    "activations": "the activations",
    "logits": "the logits",
}
"""Kinds in the order in which they come, and what they are called."""


@dataclass(frozen=True)
class Machine:
    """What it is planned for. device: None where no GPU is named. memory: bytes of one, None: unbounded."""

    ranks: int = 1
    on_gpu: bool = False
    device: Device | None = None
    memory: float | None = None

    @property
    def room(self) -> float:
        """Bytes for tensors."""
        if self.memory is None:
            return math.inf
        return self.memory - (CONTEXT if self.on_gpu else 0)


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to on a machine."""

    machine: Machine
    course: Course
    rehearsal: Rehearsal
    time: StepTime | None
    flops: float
    """Of a step of one rank, recomputation left out."""
    steps: int | None
    """Optimizer steps of the run; None where the data would have to say."""
    knows_data: bool = True

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory."""
        return self.rehearsal.device.total <= self.machine.room

    @property
    def first_that_does_not(self) -> str:
        """The first kind, in the order of a run, for which there is no room; empty where all fits."""
        total = 0
        for kind, words in IN_ORDER.items():
            total += self.rehearsal.device.kinds.get(kind, 0)
            if total > self.machine.room:
                return words
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: bytes, seconds, operations."""
        course, found = self.course, self.rehearsal
        device = self.machine.device
        return {
            "ranks": self.machine.ranks,
            "device": device.name if device else ("gpu" if self.machine.on_gpu else "cpu"),
            "memory_per_device": self.machine.memory,
            "parameters": found.parameters, "trained_parameters": found.trained,
            "steps": self.steps,
            "global_batch_size": course.global_batch_size,
            "samples": course.samples, "tokens": course.tokens,
            "trained_tokens": course.trained_tokens,
            "largest_micro_batch": list(course.shape),
            "peak": found.device.total, "peak_by_kind": found.device.kinds,
            "peak_phase": found.device.phase, "between_steps": found.steady,
            "host_peak_per_rank": found.host.total, "host_peak_by_kind": found.host.kinds,
            "fits": self.fits, "first_that_does_not_fit": self.first_that_does_not,
            "model_flops_per_step_and_rank": self.flops,
            "step_seconds": self.time.total if self.time else None,
            "step_seconds_by_part": asdict(self.time) if self.time else None,
            "total_seconds": self.time.total * self.steps if self.time and self.steps else None,
            "efficiency": EFFICIENCY if self.time else None,
        }  # fmt: skip


def make_plan(
    recipe: Recipe, prepared: Prepared, machine: Machine, *, knows_data: bool = True,
    course: Course | None = None,
) -> Plan:  # fmt: skip
    """Rehearse a recipe and say what it comes to."""
    config = recipe.config
    course = course or course_of(config, prepared, ranks=machine.ranks)
    found = rehearse(
        recipe, prepared, ranks=machine.ranks, on_gpu=machine.on_gpu,
        micro_batches=course.micro_batches,
    )  # fmt: skip
    flops, time = _timed(config, course, found, machine)
    steps = course.steps if knows_data or config.train_iters else None
    return Plan(machine, course, found, time, flops, steps, knows_data)


def _timed(
    config: Any, course: Course, found: Rehearsal, machine: Machine
) -> tuple[float, StepTime | None]:
    from arctic_like.engine.ds_section import tensor_parallel_size, zero_stage

    cost = found.cost
    if cost is None or not course.steps:
        return 0.0, None
    share = 1 / (course.steps * machine.ranks)
    tokens, squares = course.tokens * share, course.squares * share
    flops = float(cost.flops(tokens, squares))
    if machine.device is None:
        return flops, None
    forward = 2 * cost.parameters * tokens + 4 * cost.attention * squares
    again = recomputed_share(config.model) * forward + 2 * found.tiled * tokens
    stage, layers = zero_stage(config.deepspeed), tensor_parallel_size(config.deepspeed)
    in_group = tokens * layers * config.sequence_parallel_size
    width = 4 if config.model.dtype == "fp32" else 2
    work = Work(
        model_flops=flops, recomputed_flops=again,
        bytes_weights=width * found.own,
        bytes_gradients=found.own_trained * (4 if stage else width),
        bytes_trained_weights=width * found.own_trained, trained=found.own_trained,
        micro_batches=course.rounds, stage=stage, ranks=machine.ranks // layers,
        repeated_flops=6 * found.repeated * tokens * (layers - 1),
        bytes_exchanged=found.exchanged * in_group,
    )  # fmt: skip
    return flops, step_time(work, machine.device)


def recomputed_share(model: Any) -> float:
    """The share of a forward pass's matrix products that checkpointing does again. `selective` keeps them."""
    if getattr(model, "keeps_activations", True):
        return 0.0
    how = getattr(model, "activation_checkpointing", "full")
    return 1 / how if isinstance(how, int) else float(how == "full")


def kinds(found: Mapping[str, int]) -> list[tuple[str, int]]:
    """(words, bytes), the largest first."""
    rows = [(IN_ORDER.get(kind, kind), size) for kind, size in found.items() if size]
    return sorted(rows, key=lambda row: -row[1])
