"""The ranks that share rows, and what they exchange: each operation has the gradient that it must have.

A gradient here is that of the *sum* of what all ranks of the group back-propagate, whatever each of them
makes of its value. All ranks of a group must make the same calls in the same order, in the backward too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.world import World


@dataclass(frozen=True)
class SequenceGroup:
    """One rank's place among those that share its rows. Alone (size 1) everything is the identity."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """torch's process group; None where the rank is alone."""

    @classmethod
    def of(cls, world: World, *, timeout: timedelta | None = None) -> SequenceGroup:
        """This rank's group: `sequence_parallel_size` ranks, consecutive but for those that share layers.
        Collective over all ranks.

        timeout: how long a rank waits for another; torch's own unless given."""
        size = world.sequence_parallel_size
        if size == 1:
            return cls()
        import torch.distributed as dist

        mine, step = None, world.tensor_parallel_size
        firsts = (
            base + place for base in range(0, world.size, size * step) for place in range(step)
        )
        for first in firsts:  # every rank opens every group, in one order
            ranks = list(range(first, first + size * step, step))
            opened = dist.new_group(ranks, timeout=timeout)
            mine = opened if world.rank in ranks else mine
        return cls(world.sequence_rank, size, mine)

    def part(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a whole tensor, a view. Its length along `dim` is a multiple of `size`."""
        length = tensor.shape[dim] // self.size
        return tensor.narrow(dim, self.rank * length, length)

    def whole(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """All ranks' parts, one behind the other along `dim`; differentiable."""
        if self.size == 1:
            return tensor
        found: Tensor = _functions().Whole.apply(tensor, self, dim)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks of the group; differentiable."""
        if self.size == 1:
            return tensor
        found: Tensor = _functions().Sum.apply(tensor, self)
        return found

    def exchange(self, tensor: Tensor) -> Tensor:
        """(size, …): element r goes to rank r, and what came from rank r stands in its place;
        differentiable."""
        if self.size == 1:
            return tensor
        found: Tensor = _functions().Exchange.apply(tensor, self)
        return found


@functools.cache
def _functions() -> Any:
    import torch
    import torch.distributed as dist

    def summed(tensor: Tensor, group: SequenceGroup) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group.group)
        return total

    def exchanged(tensor: Tensor, group: SequenceGroup) -> Tensor:
        given = tensor.contiguous()
        found = torch.empty_like(given)
        dist.all_to_all_single(found, given, group=group.group)
        return found

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor, group: SequenceGroup) -> Tensor:
            ctx.group = group
            return summed(tensor, group)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return summed(gradients[0], ctx.group), None

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor, group: SequenceGroup, dim: int) -> Tensor:
            ctx.group, ctx.dim = group, dim
            given = tensor.contiguous()
            parts = [torch.empty_like(given) for _ in range(group.size)]
            dist.all_gather(parts, given, group=group.group)
            return torch.cat(parts, dim)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return ctx.group.part(summed(gradients[0], ctx.group), ctx.dim), None, None

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: Tensor, group: SequenceGroup) -> Tensor:
            ctx.group = group
            return exchanged(tensor, group)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            return exchanged(gradients[0], ctx.group), None

    class Functions:
        pass

    functions: Any = Functions()
    functions.Sum, functions.Whole, functions.Exchange = Sum, Whole, Exchange
    return functions
