"""One pass over the tiles of a loss, and the two ways autograd takes part in it.

`summed`: the gradient of the sum is computed as the tiles go by, since what comes from above is one number
that multiplies it; nothing is computed twice. `each`: the gradient of every token's loss is scaled by a
number of its own. Where only the hidden states want a gradient, that too is known as the tiles go by;
where the head is trained, the tiles are computed again in the backward.

Gradients are summed over the tiles in float32 (float64 for float64) and rounded once, to the dtype of
what they belong to, when the number from above has multiplied them: each tile's sum in bf16 would round as
often as there are tiles. Until then the weight's takes vocabulary · hidden · 4 bytes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from arctic_like.kernels.tile_losses import TileLoss
from arctic_like.kernels.tiles import Head, Logits, compute_dtype, multiply, tile_rows, tiles

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor


class Wanted(NamedTuple):
    """Whose gradient is wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low: bool = False


NOTHING = Wanted()


class Gradients(NamedTuple):
    """In the dtype of the computation; None where not wanted."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low: Tensor | None = None


def rows_for(
    head: Head, *, loss_buffers: float = 0.0, gradient: bool = True, tile: int | None = None
) -> int:
    """Tokens of a tile: `tile`, or what the budget allows with all buffers that the pass has."""
    if tile is not None:
        if tile < 1:
            raise ValueError(f"a tile has {tile} tokens; it wants at least 1")
        return tile
    narrow = compute_dtype(head.weight.dtype) != head.weight.dtype
    own = 1.0 + (0.5 * narrow + bool(head.softcap)) * gradient
    return tile_rows(head, buffers=own + loss_buffers)


def summed(hidden: Tensor, head: Head, loss: TileLoss, *, tile: int) -> tuple[Tensor, Tensor]:
    """(sum of the tokens' losses: a scalar with gradient; (parts, tokens) values without one).

    hidden: (tokens, head.width) in the dtype of the head's weight. float32, or float64 for float64.
    """
    if not any(_wanted(hidden, head)):
        values, _ = run(hidden.detach(), head, loss, tile=tile)
        return values[0].sum(), values
    found: tuple[Tensor, Tensor] = _functions().summed.apply(
        hidden, head.weight, head.bias, head.low, head, loss, tile
    )
    return found


def each(hidden: Tensor, head: Head, loss: TileLoss, *, tile: int) -> Tensor:
    """The tokens' losses, (tokens,), with gradient: see `summed`."""
    if not any(_wanted(hidden, head)):
        return run(hidden.detach(), head, loss, tile=tile)[0][0]
    found: Tensor = _functions().each.apply(
        hidden, head.weight, head.bias, head.low, head, loss, tile
    )
    return found


def run(
    hidden: Tensor, head: Head, loss: TileLoss, *, tile: int, wanted: Wanted = NOTHING,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Values (parts, tokens), and the gradients of Σ upstream · loss (upstream: (tokens,); None: ones)."""
    import torch

    tokens, width = hidden.shape
    gradient = any(wanted)
    tile = min(tile, max(tokens, 1))
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        logits = Logits(head, tile, gradient=gradient)
        empty = functools.partial(torch.empty, dtype=logits.dtype, device=hidden.device)
        values = empty((loss.parts, tokens))
        found = Gradients(
            hidden=empty((tokens, width)) if wanted.hidden else None,
            weight=_zeros(empty, head.weight if wanted.weight else None),
            bias=_zeros(empty, head.bias if wanted.bias else None),
            low=_zeros(empty, head.low if wanted.low else None),
        )
        for rows in tiles(tokens, tile):
            scores = logits.of(hidden[rows])
            values[:, rows] = loss(scores, rows, gradient=gradient)
            if not gradient:
                continue
            if upstream is not None:
                scores.mul_(upstream[rows, None])
            _add(found, logits.back(scores), hidden, rows, logits)
    return values, found


def _zeros(empty: Callable[[torch.Size], Tensor], like: Tensor | None) -> Tensor | None:
    return None if like is None else empty(like.shape).zero_()


def _add(found: Gradients, gradient: Tensor, hidden: Tensor, rows: slice, logits: Logits) -> None:
    if found.bias is not None:
        found.bias.add_(gradient.sum(0))
    operand = logits.operand(gradient)
    if found.hidden is not None:
        own, more = logits.split(found.hidden[rows])
        multiply(operand, logits.weight, out=own)
        if logits.low is not None:
            multiply(operand, logits.low, out=more)
    own, more = logits.split(hidden[rows])
    if found.weight is not None:
        multiply(operand.t(), logits.operand(own), out=found.weight, add=True)
    if found.low is not None:
        multiply(operand.t(), logits.operand(more), out=found.low, add=True)


def _wanted(hidden: Tensor, head: Head) -> Wanted:
    import torch

    if not torch.is_grad_enabled():
        return NOTHING
    bias, low = (x is not None and x.requires_grad for x in (head.bias, head.low))
    return Wanted(hidden.requires_grad, head.weight.requires_grad, bias, low)


def _scaled(gradient: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """gradient · upstream, rounded once to `dtype`; a new tensor."""
    import torch

    if gradient is None:
        return None
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, upstream, out=out)


class _Functions(NamedTuple):
    summed: Any
    each: Any


@functools.cache
def _functions() -> _Functions:
    """The autograd functions, made at the first use: torch is not imported before."""
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    class Summed(Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None,
            head: Head, loss: TileLoss, tile: int,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            wanted = Wanted(*ctx.needs_input_grad[:4])
            values, found = run(hidden, head, loss, tile=tile, wanted=wanted)
            ctx.save_for_backward(found.hidden, found.weight, found.bias, found.low)
            ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, low)]
            ctx.mark_non_differentiable(values)
            return values[0].sum(), values

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
            found = (
                _scaled(gradient, upstream, dtype)
                for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            )
            return (*found, None, None, None)

    class Each(Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None,
            head: Head, loss: TileLoss, tile: int,
        ) -> Tensor:  # fmt: skip
            wanted = Wanted(*ctx.needs_input_grad[:4])
            ctx.again = wanted.weight or wanted.bias or wanted.low
            ctx.scale, ctx.softcap, ctx.loss, ctx.tile = head.scale, head.softcap, loss, tile
            ctx.dtype = hidden.dtype
            if ctx.again:
                values, _ = run(hidden, head, loss, tile=tile)
                ctx.save_for_backward(hidden, weight, bias, low)
            else:
                values, found = run(hidden, head, loss, tile=tile, wanted=wanted)
                ctx.save_for_backward(found.hidden)
            return values[0].clone()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, upstream: Tensor) -> Any:
            if not ctx.again:
                (known,) = ctx.saved_tensors
                return (_scaled(known, upstream[:, None], ctx.dtype), *(None,) * 6)
            hidden, weight, bias, low = ctx.saved_tensors
            head = Head(weight, bias, ctx.scale, ctx.softcap, low)
            _, found = run(
                hidden, head, ctx.loss, tile=ctx.tile, upstream=upstream,
                wanted=Wanted(*ctx.needs_input_grad[:4]),
            )  # fmt: skip
            pairs = zip(found, (hidden, weight, bias, low), strict=True)
            gradients = [None if g is None else g.to(of.dtype) for g, of in pairs]
            return (*gradients, None, None, None)

    return _Functions(Summed, Each)
