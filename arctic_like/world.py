"""The distributed world, read once from the environment that the launcher made.

Knows ranks and devices; does not know DeepSpeed. `engine.deepspeed.connect` opens the process groups.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: str = "cpu"
    """Torch device string of this process: "cpu" or "cuda:0"."""
    sequence_parallel_size: int = 1
    """How many ranks of a group share the tokens of its rows."""
    tensor_parallel_size: int = 1
    """How many consecutive ranks share the model's layers."""

    @property
    def group_size(self) -> int:
        """How many consecutive ranks work on the same rows; divides `size`."""
        return self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def sequence_rank(self) -> int:
        """Which part of its group's rows this rank has."""
        return self.rank // self.tensor_parallel_size % self.sequence_parallel_size

    @property
    def noise_rank(self) -> int:
        """The same number on ranks that must draw the same: those that share layers of the same tokens."""
        return self.rank // self.tensor_parallel_size

    @property
    def data_rank(self) -> int:
        """The number of this rank's group: which micro-batches it has."""
        return self.rank // self.group_size

    @property
    def data_size(self) -> int:
        """How many groups there are, each with rows of its own."""
        return self.size // self.group_size

    @property
    def counts(self) -> bool:
        """True on the first rank of a group. All ranks of one have the same loss of the same rows; where
        numbers of all ranks are added up, this one speaks for them."""
        return self.rank % self.group_size == 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return self.rank == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks as a torch DeviceMesh of one dimension, "dp", as if all were data-parallel.

        Made on first use, which is collective. The process groups are open by then.
        """
        from torch.distributed.device_mesh import init_device_mesh

        kind = self.device.partition(":")[0]
        return init_device_mesh(kind, (self.size,), mesh_dim_names=("dp",))

    @classmethod
    def from_environment(cls, device: str = "cpu") -> World:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE; one process where they are absent."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", 1))),
            device=device,
        )
