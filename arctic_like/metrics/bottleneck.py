"""What holds a step up, from measured times: pure functions of numbers.

The rules, in the order in which their share of the step decides: a phase that is not computation and takes
at least a quarter (data, communication, optimizer); on CUDA a device that stands still for at least a
quarter of the rest (launch-bound: the host does not hand it work fast enough); else what the operators do
most of the time: matrix products and attention (compute) or everything else, which moves memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LARGE = 0.25
"""From this share of a step on, a part that is no computation is called what holds it up."""
PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "einsum", "conv", "attention", "flash", "gemm",
    "cutlass", "cublas", "xmma", "wgmma", "nvjet", "grouped_mm",
)  # fmt: skip
"""Parts of the names of operators and kernels that compute more than they move."""

ADVICE: dict[str, tuple[str, ...]] = {
    "data": (
        "Prepare the data before the run (arctic-train preprocess), or let it be read beside the steps:"
        " data.dl_num_workers.",
    ),
    "communication": (
        "A lower ZeRO stage exchanges less, if it fits; more gradient_accumulation_steps exchange less often"
        " for a token.",
        "If one rank waits for another: data.balance evens out their tokens.",
    ),
    "optimizer": (
        "A larger global batch has fewer updates for a token; a fused optimizer and no offload of its states"
        " make each quicker.",
    ),
    "launch": (
        "Give the device more at once: a larger micro_batch_size, longer packed rows (data.pack_samples,"
        " data.max_length).",
        "Fewer, larger kernels: model.type: liger.",
    ),
    "memory": (
        "The time goes into operations that move memory (norms, activations, copies, softmax): fused kernels"
        " (model.type: liger) and a lower precision (model.dtype: bf16) move less.",
    ),
    "compute": (
        "The device computes: this is as it should be. Less work is what is left: pack samples,"
        " no more activation checkpointing than needed, a smaller model or an adapter.",
    ),
}


@dataclass(frozen=True)
class Operation:
    """An operator (CPU) or kernel (CUDA): its own time, seconds a step, and calls a step."""

    name: str
    seconds: float
    calls: float

    @property
    def is_product(self) -> bool:
        """Whether it computes more than it moves, by its name."""
        name = self.name.lower().removeprefix("aten::")
        return any(part in name for part in PRODUCTS)


@dataclass(frozen=True)
class Finding:
    """kind: a key of `ADVICE`. share: of the step's time (compute, memory: of the operators' time)."""

    kind: str
    share: float

    @property
    def title(self) -> str:
        """`data-bound`."""
        return f"{self.kind}-bound"

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about it."""
        return ADVICE[self.kind]


def bottleneck(
    phases: Mapping[str, float], operations: Sequence[Operation], *, idle: float | None = None
) -> Finding:
    """What holds the step up.

    phases: seconds a step by phase. operations: of forward, backward and update. idle: the share of the
    steps' time in which no kernel ran on the device; None on a CPU.
    """
    step = sum(phases.values())
    if step <= 0:
        raise ValueError("no time was measured")
    shares = {kind: phases.get(kind, 0.0) / step for kind in ("data", "communication", "optimizer")}
    if idle is not None:  # what stands still for data or an exchange is theirs
        shares["launch"] = idle - shares["data"] - shares["communication"]
    kind = max(shares, key=lambda name: shares[name])
    if shares[kind] >= LARGE:
        return Finding(kind, shares[kind])
    total = sum(one.seconds for one in operations)
    products = sum(one.seconds for one in operations if one.is_product)
    share = products / total if total else 1.0
    return Finding("compute", share) if share >= 0.5 else Finding("memory", 1 - share)


def idle_share(kernels: Sequence[tuple[float, float]], *, begin: float, end: float) -> float:
    """The share of the time from begin to end in which none of the kernels ran. kernels: (start, end), in any
    order, overlapping or not, in the unit of begin and end."""
    busy, reached = 0.0, begin
    for start, stop in sorted(kernels):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            busy += stop - start
            reached = stop
    return 1.0 - busy / (end - begin)
