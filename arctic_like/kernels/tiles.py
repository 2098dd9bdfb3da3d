"""Logits of a linear head, some tokens at a time, in buffers that every tile uses again.

The product is taken in float32 for hidden states and weights of lower precision: on CUDA from bf16
operands straight into a float32 result, elsewhere from a float32 copy of the weight that lives as long as
the call. So logits are not rounded to bf16, as those of the head itself are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE_BYTES = {"cpu": 2**26}
"""What the tiles of a call may take by kind of device: on a CPU as much as a cache helps with."""
TILE_BYTES_ELSEWHERE = 2**28
"""A GPU wants more rows: each tile reads and writes the whole gradient of the weight."""


@dataclass(frozen=True, eq=False)
class Head:
    """What makes logits of hidden states: softcap · tanh(scale · (h · weightᵀ + bias) / softcap).

    weight: (vocabulary, hidden); bias: (vocabulary,) or None, in the weight's dtype. softcap: None for
    none (Gemma 2, arXiv 2408.00118, section 2). scale: Cohere multiplies, Granite divides. low: (vocabulary,
    rank), the B of an adapter of the head (LoRA, arXiv 2106.09685, section 4.1), in the weight's dtype: h has
    `rank` columns more than weight, which are multiplied by it and added to the rest. So h · [weight, low]ᵀ,
    of which no copy is made.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Columns of the hidden states, those of the adapter included."""
        return self.weight.shape[1] + (0 if self.low is None else self.low.shape[1])


def detached(head: Head) -> Head:
    """The same, without gradient."""
    bias, low = (None if x is None else x.detach() for x in (head.bias, head.low))
    return Head(head.weight.detach(), bias, head.scale, head.softcap, low)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and gradients are computed in: float64 for float64, else float32."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def tile_rows(head: Head, *, buffers: float = 1.0, budget: int | None = None) -> int:
    """Tokens of a tile: `buffers` arrays of (tokens, vocabulary) fit into `budget` bytes; at least 1."""
    weight = head.weight
    if budget is None:
        budget = TILE_BYTES.get(weight.device.type, TILE_BYTES_ELSEWHERE)
    size = compute_dtype(weight.dtype).itemsize
    return max(1, int(budget / (buffers * size * head.vocabulary)))


def tiles(tokens: int, rows: int) -> Iterator[slice]:
    """Slices of at most `rows` that cover `tokens`, as even as can be."""
    count = max(1, -(-tokens // rows))
    edges = [tokens * number // count for number in range(count + 1)]
    return (slice(low, high) for low, high in itertools.pairwise(edges) if high > low)


class Logits:
    """The logits of tile after tile, and the way back from their gradients.

    rows: of the largest tile. gradient: whether `back` will be asked for.
    """

    def __init__(self, head: Head, rows: int, *, gradient: bool = False) -> None:
        import torch

        self.head = head
        self.dtype = compute_dtype(head.weight.dtype)
        widens = head.weight.dtype == torch.bfloat16 and multiplies_wide(head.weight.device)
        self.weight = head.weight if widens else head.weight.to(self.dtype)
        """In the dtype of the products' operands."""
        self.low = None if head.low is None else self.operand(head.low)
        shape = (rows, head.vocabulary)
        self._buffer = torch.empty(shape, dtype=self.dtype, device=head.weight.device)
        self._tanh = torch.empty_like(self._buffer) if gradient and head.softcap else None

    def operand(self, value: Tensor) -> Tensor:
        """In the dtype of the products' operands."""
        return value.to(self.weight.dtype)

    def of(self, hidden: Tensor) -> Tensor:
        """The logits (n, vocabulary) of hidden states (n, hidden): the caller's until the next call."""
        head, found = self.head, self._buffer[: len(hidden)]
        own, more = self.split(self.operand(hidden))
        multiply(own, self.weight.t(), out=found)
        if self.low is not None:
            multiply(more, self.low.t(), out=found, add=True)
        if head.bias is not None:
            found.add_(head.bias)
        if head.scale != 1.0:
            found.mul_(head.scale)
        if head.softcap:
            found.div_(head.softcap).tanh_()
            if self._tanh is not None:
                self._tanh[: len(hidden)].copy_(found)
            found.mul_(head.softcap)
        return found

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of the weight, and those of the adapter; views."""
        width = self.weight.shape[1]
        return hidden[:, :width], hidden[:, width:]

    def back(self, gradient: Tensor) -> Tensor:
        """From the gradient for the last logits to that for h · [weight, low]ᵀ + bias, in place."""
        if self._tanh is not None:
            slope = self._tanh[: len(gradient)].square_().neg_().add_(1)
            gradient.mul_(slope)
        if self.head.scale != 1.0:
            gradient.mul_(self.head.scale)
        return gradient


def multiply(left: Tensor, right: Tensor, *, out: Tensor, add: bool = False) -> None:
    """left · right into `out`, or added to it. Operands of one dtype, which may be lower than `out`'s."""
    import torch

    if left.dtype == out.dtype:
        if add:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)
    elif add:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


@functools.cache
def multiplies_wide(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices into a float32 result (CUDA does, the CPU does not)."""
    import torch

    if device.type == "cpu":
        return False
    with torch.no_grad():
        try:
            left = torch.full((16, 32), 1.0078125, dtype=torch.bfloat16, device=device)
            out = torch.ones(16, 16, device=device)
            multiply(left, left.t(), out=out, add=True)
            added = float(out[0, 0])
            multiply(left, left.t(), out=out)
            exact = 32 * 1.0078125**2
            return (added, float(out[0, 0])) == (exact + 1, exact)
        except (RuntimeError, TypeError):
            return False
