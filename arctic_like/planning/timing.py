"""How long a step takes, from numbers that a device's maker publishes and two that are stated here.

    step = exchanges + max(compute, memory, communication)    compute and communication overlap

- compute: (model FLOPs + recomputed FLOPs) / (peak · EFFICIENCY). Model FLOPs are those that `throughput`
  counts (Chowdhery et al. 2022, PaLM, appendix B; documents of a packed row by themselves, chosen experts,
  no gradient of frozen weights); recomputation is one more forward.
- memory: weights are read in the forward, again in the backward and, checkpointed, in the recomputation;
  gradients are written once a micro-batch; the update reads and writes masters and states once.
- communication, of P trained and A all parameters over n ranks, ring algorithms (Rajbhandari et al. 2020,
  ZeRO, section 7): gradients are reduced once a micro-batch at stages 2 and 3, once a step at 0 and 1;
  weights are gathered once a step at stages 1 and 2, twice a micro-batch at stage 3. Where ranks share
  layers, P and A are a rank's part of them, and n the ranks that have the same part.
- exchanges: what ranks that share rows or layers send each other (`exchanges.py`), for which layers wait.

An estimate: sizes of single kernels, data loading and the host are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from arctic_like.planning.devices import Device

EFFICIENCY = 0.45
"""The share of the published peak that matrix products of training reach; stated with every prediction."""
LINK_EFFICIENCY = 0.7


@dataclass(frozen=True)
class Work:
    """What one step asks of one rank. bytes_weights: of all weights in the model's dtype; bytes_gradients: of
    all gradients as they are sent; trained: number of trained parameters; ranks: among which ZeRO divides.
    Where ranks share layers all these are of a rank's part, and repeated_flops what each of them does of
    what is not divided, beyond its share of the model's. bytes_exchanged: sent by a rank, in all layers."""

    model_flops: float
    recomputed_flops: float
    bytes_weights: float
    bytes_gradients: float
    bytes_trained_weights: float
    trained: float
    micro_batches: int
    stage: int
    ranks: int
    repeated_flops: float = 0.0
    bytes_exchanged: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    memory: float
    communication: float
    exchanges: float = 0.0

    @property
    def total(self) -> float:
        """Of the step."""
        return self.exchanges + max(self.compute, self.memory, self.communication)

    @property
    def bound_by(self) -> str:
        """What takes longest."""
        parts = vars(self)
        return max(parts, key=lambda name: float(parts[name]))


def step_time(work: Work, device: Device) -> StepTime:
    """Seconds of one optimizer step."""
    flops = work.model_flops + work.recomputed_flops + work.repeated_flops
    passes = 3 if work.recomputed_flops else 2
    traffic = work.micro_batches * (passes * work.bytes_weights + 2 * work.bytes_gradients)
    updated = work.trained / (work.ranks if work.stage else 1)
    traffic += 2 * 3 * 4 * updated  # a master weight and two states, read and written
    return StepTime(
        flops / (device.flops * EFFICIENCY),
        traffic / device.bandwidth,
        sent(work) / (device.link * LINK_EFFICIENCY),
        work.bytes_exchanged / (device.link * LINK_EFFICIENCY),
    )


def sent(work: Work) -> float:
    """Bytes that a rank sends in a step, ring algorithms."""
    if work.ranks == 1:
        return 0.0
    share = (work.ranks - 1) / work.ranks
    reductions = work.micro_batches if work.stage >= 2 else 1
    gradients = share * work.bytes_gradients * reductions * (2 if work.stage == 0 else 1)
    gathers = {0: 0.0, 1: work.bytes_trained_weights, 2: work.bytes_trained_weights}
    weights = gathers.get(work.stage, 2 * work.micro_batches * work.bytes_weights)
    return gradients + share * weights
