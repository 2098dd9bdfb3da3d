"""MLPs computed for a piece of the sequence at a time.

Between its two projections an MLP holds several times the width of the hidden states; for a long row that is
the most that a checkpointed layer keeps while its backward runs. Each token goes through it by itself, so the
row is cut: forward keeps the input alone, backward computes piece by piece again. Gradients of the weights
are summed over the pieces in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NAMES = ("mlp", "feed_forward", "ffn")
"""What transformers' layers call their MLP."""


def tile_mlps(model: nn.Module, *, tokens: int | None = None, zero_stage: int = 0) -> int:
    """Let every MLP of a model compute piece by piece; returns how many there are.

    tokens: of a piece, unless given as many as the hidden states are wide, so that a piece's intermediate
    values take about what the weights take. zero_stage: at 3 each MLP is gathered whole, once for all pieces.
    Raises RecipeError where none is found, and where one routes tokens to experts.
    """
    found = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in NAMES and any(True for _ in module.parameters())
    ]
    if not found:
        raise RecipeError(
            Problem(f"is true, and {type(model).__name__} has no MLP that is known by name",
                    place="tiled_mlp_compute", hint="leave it out")
        )  # fmt: skip
    for module in found:
        if any("expert" in name or "router" in name for name, _ in module.named_modules()):
            raise RecipeError(
                Problem(f"is not built for experts ({type(module).__name__})",
                        place="tiled_mlp_compute", hint="leave it out")
            )  # fmt: skip
        module.forward = functools.partial(_tiled, module, module.forward, tokens)
    if zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list({type(module) for module in found}))
    return len(found)


def is_tiled(module: nn.Module) -> bool:
    """Whether a module computes piece by piece."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _tiled


def _tiled(
    module: nn.Module, forward: Callable[[Tensor], Tensor], tokens: int | None, hidden: Tensor
) -> Tensor:
    """The MLP of hidden states (…, length, width), in pieces of the length."""
    import torch

    size = tokens or hidden.shape[-1]
    count = math.ceil(hidden.shape[-2] / size) if hidden.ndim >= 2 else 1
    if count < 2:
        return forward(hidden)
    if not torch.is_grad_enabled():
        return torch.cat([forward(piece) for piece in _pieces(hidden, count)], dim=-2)
    trained = [p for p in module.parameters() if p.requires_grad]
    if not hidden.requires_grad and not trained:
        return torch.cat([forward(piece) for piece in _pieces(hidden, count)], dim=-2)
    found: Tensor = _function().apply(forward, count, hidden, *trained)
    return found


def _pieces(hidden: Tensor, count: int) -> Iterator[Tensor]:
    # Contiguous, as the whole is: some layers look at tokens through `view`.
    return (piece.contiguous() for piece in hidden.chunk(count, dim=-2))


def _added(total: Tensor | None, more: Tensor | None, wide: torch.dtype) -> Tensor | None:
    if more is None:
        return total
    return more.to(wide) if total is None else total.add_(more)


@functools.cache
def _function() -> Any:
    """The autograd function, made at the first use: torch is not imported before."""
    import torch
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    class Tiled(Function):
        @staticmethod
        def forward(
            ctx: Any, forward: Callable[[Tensor], Tensor], count: int, hidden: Tensor, *trained: Tensor
        ) -> Tensor:  # fmt: skip
            ctx.run, ctx.count, ctx.trained = forward, count, trained
            ctx.save_for_backward(hidden)
            ctx.random = _random_state(hidden)
            ctx.cast = _autocast(hidden)
            return torch.cat([forward(piece) for piece in _pieces(hidden, count)], dim=-2)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, above: Tensor) -> Any:
            (hidden,) = ctx.saved_tensors
            needs = ctx.needs_input_grad[2]
            wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
            below = torch.empty_like(hidden) if needs else None
            sums: list[Tensor | None] = [None] * len(ctx.trained)
            pieces = zip(
                hidden.chunk(ctx.count, dim=-2), above.chunk(ctx.count, dim=-2),
                below.chunk(ctx.count, dim=-2) if below is not None else [None] * ctx.count,
                strict=False,
            )  # fmt: skip
            with ctx.random(), ctx.cast():  # the same order as forward: dropout draws the same
                for piece, upstream, place in pieces:
                    own = piece.detach().contiguous().requires_grad_(needs)
                    with torch.enable_grad():
                        found = ctx.run(own)
                    wanted: Sequence[Tensor] = [*([own] if needs else []), *ctx.trained]
                    gradients = torch.autograd.grad(found, wanted, upstream, allow_unused=True)
                    if place is not None:
                        place.copy_(gradients[0])
                    for number, gradient in enumerate(gradients[needs:]):
                        sums[number] = _added(sums[number], gradient, wide)
            rounded = [
                None if total is None else total.to(parameter.dtype)
                for total, parameter in zip(sums, ctx.trained, strict=True)
            ]
            return (None, None, below, *rounded)

    return Tiled


def _random_state(hidden: Tensor) -> Callable[[], Any]:
    """Makes contexts that replay the random numbers from here on, and leave the generators as they are."""
    import torch

    devices = [hidden.device] if hidden.device.type == "cuda" else []
    host = torch.get_rng_state()
    states = [torch.cuda.get_rng_state(device) for device in devices]

    @contextlib.contextmanager
    def replay() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(host)
            for device, state in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield

    return replay


def _autocast(hidden: Tensor) -> Callable[[], Any]:
    import torch

    device = hidden.device.type
    return functools.partial(
        torch.autocast, device, enabled=torch.is_autocast_enabled(device),
        dtype=torch.get_autocast_dtype(device),
    )  # fmt: skip
