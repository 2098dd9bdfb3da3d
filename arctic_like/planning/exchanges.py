"""What ranks that share rows or layers send each other, counted from the collectives that a rehearsal calls.

Layers wait for these, so they come on top of the time of a step. What ZeRO sends overlaps with them and
follows from a formula (`timing.sent`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any


class Exchanges:
    """Bytes that this rank sends, by process group. Ring algorithms (Thakur, Rabenseifner and Gropp 2005,
    Optimization of Collective Communication Operations in MPICH, section 4)."""

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()

    def see(self, function: Any, args: Any) -> None:
        """An operation of torch; any that is no collective is passed over."""
        count = _counts().get(function)
        if count is None:
            return
        group = _group_of(args)
        self._sent[group.group_name] += count(args, group.size())

    def through(self, groups: Iterable[Any]) -> int:
        """Bytes so far through these process groups."""
        return sum(self._sent[name] for name in {group.group_name for group in groups})


@functools.cache
def _counts() -> dict[Any, Callable[[Any, int], int]]:
    """Collective → bytes that a rank of n sends, from the operation's arguments."""
    import torch

    ops = torch.ops.c10d
    return {
        ops.allreduce_.default: lambda args, n: 2 * _bytes(args[0]) * (n - 1) // n,
        ops.alltoall_base_.default: lambda args, n: _bytes([args[1]]) * (n - 1) // n,
        ops.allgather_.default: lambda args, n: _bytes(args[1]) * (n - 1),
        ops._allgather_base_.default: lambda args, n: _bytes([args[1]]) * (n - 1),
        ops._reduce_scatter_base_.default: lambda args, n: _bytes([args[1]]) * (n - 1) // n,
    }


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _group_of(args: Any) -> Any:
    """The process group among the arguments: the first that is an object of torch's C++ classes."""
    import torch
    from torch.distributed import ProcessGroup

    return ProcessGroup.unbox(next(one for one in args if isinstance(one, torch.ScriptObject)))
