"""Devices by name: what they compute, read and send, as their makers publish it.

flops: dense bf16, operations a second. memory: bytes that can be allocated, in powers of 1024 of the nominal
size. bandwidth: memory, bytes a second. link: between a node's devices, bytes a second in one direction.

Sources: NVIDIA's data sheets of A100 (80 GB SXM), H100 SXM, H200 SXM, HGX B200 (one of its eight),
L4, L40S and A10, its white paper on the Ada architecture for GeForce RTX 4090, AMD's data sheet of MI300X.
"""

from __future__ import annotations

from dataclasses import dataclass

from arctic_like.errors import Problem, RecipeError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float


DEVICES = {
    device.name: device
    for device in (
        Device("a10", 125e12, 24 * GIB, 600e9, 32e9),
        Device("a100", 312e12, 80 * GIB, 2039e9, 300e9),
        Device("a100-40", 312e12, 40 * GIB, 1555e9, 300e9),
        Device("b200", 2250e12, 180 * GIB, 8000e9, 900e9),
        Device("h100", 989.4e12, 80 * GIB, 3350e9, 450e9),
        Device("h200", 989.4e12, 141e9, 4800e9, 450e9),
        Device("l4", 121e12, 24 * GIB, 300e9, 32e9),
        Device("l40s", 362e12, 48 * GIB, 864e9, 32e9),
        Device("mi300x", 1307.4e12, 192 * GIB, 5300e9, 448e9),
        Device("rtx4090", 165.2e12, 24 * GIB, 1008e9, 32e9),
    )
}


def device_of(name: str) -> Device:
    """A device by its name. Raises RecipeError naming those that there are."""
    found = DEVICES.get(name.lower().replace(" ", "").replace("_", "-"))
    if found is None:
        raise RecipeError(
            Problem(f"{name!r} is no device of the table", "--device",
                    f"there are {', '.join(DEVICES)}; or say --gpu-memory")
        )  # fmt: skip
    return found
