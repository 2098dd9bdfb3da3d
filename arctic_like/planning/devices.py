"""Devices by name: what they compute, read and send, as their makers publish it.

flops: dense bf16, operations a second. memory: bytes that the driver reports, which with error correction
are fewer than the nominal size. bandwidth: memory, bytes a second. link: between a node's devices, bytes a
second in one direction.

flops, bandwidth and link are those of the makers' data sheets (A100, H100 and H200 as SXM, B200 as one of
eight of an HGX; MI300X seven links of 64 GB/s; RTX 4090 from the white paper on Ada), half of what is given
with sparsity, PCIe 4.0 x16 where there is no NVLink. Compared on 2026-11-21 with reproductions of the sheets,
but for A10's, of which none was found. B200's bandwidth is 7,680 bits at 3,996 MHz as its driver says
(pytorch/ao, pull request 4002), 4 % below the sheet. memory: `nvidia-smi` of A10, A100, H100, L4 and L40S
(modal-labs/modal-client, pull request 2797), B200's of the former; nominal for H200, MI300X and RTX 4090.
"""

from __future__ import annotations

from dataclasses import dataclass

from arctic_like.errors import Problem, RecipeError

MIB, GIB = 2**20, 2**30


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
        Device("a10", 125e12, 23028 * MIB, 600e9, 32e9),
        Device("a100", 312e12, 80 * GIB, 2039e9, 300e9),
        Device("a100-40", 312e12, 40 * GIB, 1555e9, 300e9),
        Device("b200", 2250e12, 178.35 * GIB, 7672e9, 900e9),
        Device("h100", 989.4e12, 81559 * MIB, 3350e9, 450e9),
        Device("h200", 989.4e12, 141e9, 4800e9, 450e9),
        Device("l4", 121e12, 23034 * MIB, 300e9, 32e9),
        Device("l40s", 362e12, 46068 * MIB, 864e9, 32e9),
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
