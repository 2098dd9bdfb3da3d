"""What ranks agree on travels as host values over a gloo group, beside the device's own group.

Nothing here waits for the device. One process needs no group and costs nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

from arctic_like.errors import FAILED, RelayedError
from arctic_like.world import World

T = TypeVar("T")

# A rank may wait for another that tokenises, saves or compiles; one that died closes its sockets,
# which gloo notices at once, so a long limit only catches hosts that vanish.
PATIENCE = timedelta(hours=12)


def free_port() -> int:
    """A TCP port that nobody uses here, below the range that systems hand out for connections.

    The ranks open it seconds later; a port of that range could be gone by then.
    """
    candidates = random.SystemRandom().sample(range(20000, 32000), 200)
    for port in candidates:
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
            return port
    return 0  # pragma: no cover - 200 ports taken


def use_own_ninja() -> None:
    """Let DeepSpeed find the ninja beside this Python, whether or not the environment is activated.

    Another one on the PATH would not read its logs, and compile everything again.
    """
    beside = os.path.dirname(sys.executable)
    path = os.environ.get("PATH", "")
    if os.path.exists(os.path.join(beside, "ninja")) and path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = beside + os.pathsep + path


def connect(world: World) -> HostGroup:
    """Open the process groups of this run through DeepSpeed (once a process); return the host group."""
    import torch.distributed as dist

    if not dist.is_initialized():
        use_own_ninja()
        if world.local_rank == 0:
            _remove_stale_locks()
        import deepspeed

        for key, value in (
            ("RANK", world.rank),
            ("WORLD_SIZE", world.size),
            ("LOCAL_RANK", world.local_rank),
            ("MASTER_ADDR", "127.0.0.1"),
        ):
            os.environ.setdefault(key, str(value))
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        backend = "nccl" if world.device.startswith("cuda") else "gloo"
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which op it built
            deepspeed.init_distributed(
                dist_backend=backend,
                auto_mpi_discovery=False,
                verbose=False,
                timeout=PATIENCE,
            )
        _unlink_shared_buffer(world)
    return HostGroup(world)


def _remove_stale_locks() -> None:
    from loguru import logger

    from arctic_like.engine.op_locks import remove_stale_locks

    for lock in remove_stale_locks():
        logger.warning(f"removed {lock}: the process that compiled or loaded there was killed")


def _unlink_shared_buffer(world: World) -> None:
    """Take the name off this rank's buffer in /dev/shm, so that its 66 MB go when the ranks do.

    DeepSpeed's CPU communication maps it in all ranks when the groups are opened, and never removes
    it: every run, and a kill -9 too, would leave it in the machine's memory.
    """
    if world.device != "cpu" or world.size == 1:
        return
    import torch.distributed as dist

    dist.barrier()  # all ranks have opened all buffers
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{world.rank}"
    with contextlib.suppress(OSError):
        os.unlink(f"/dev/shm/{name}")


class HostGroup:
    """Collectives over host values. Every rank must make the same calls in the same order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._group: Any = None
        if world.size > 1:
            import torch.distributed as dist

            if dist.get_backend() != "gloo":
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sum over all ranks; exact for whole numbers below 2**53."""
        if self.world.size == 1:
            return [float(value) for value in values]
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return [float(value) for value in total.tolist()]

    def gather(self, value: T) -> list[T]:
        """Every rank's value (plain picklable types), in rank order, on every rank."""
        if self.world.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_main(self, value: T) -> T:
        """Rank zero's value on every rank."""
        if self.world.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world.size > 1:
            import torch.distributed as dist

            dist.barrier(group=self._group)

    def raise_together(self, error: BaseException | None) -> None:
        """If any rank brings an error, every rank raises: its own, or a `RelayedError` for the first.

        Without this the ranks that succeeded would wait in the next collective for ever.
        """
        if self.world.size == 1:
            if error is not None:
                raise error
            return
        told = self.gather(
            None if error is None else (str(error), int(getattr(error, "exit_code", FAILED)))
        )
        if error is not None:
            raise error
        for rank, failure in enumerate(told):
            if failure is not None:
                raise RelayedError(f"rank {rank} failed: {failure[0]}", exit_code=failure[1])
