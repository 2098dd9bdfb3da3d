"""Parameters that are frozen after the engine was made do not move.

DeepSpeed decides once what an optimizer trains. A parameter that loses `requires_grad` later keeps its
place among ZeRO's shares (and its fp32 copy at stage 0): with a gradient of zero, momentum and weight decay
go on moving it. Around a step its weights and states are kept and put back. `step` counters, which all
parameters of a share have in common, move on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from arctic_like.engine import access

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.engine.deepspeed import Engine


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """Around an optimizer step. Costs nothing where no parameter was frozen later; else a copy of this
    rank's part of those. Nothing is exchanged, and nothing waits for the device."""
    frozen = [p for p in engine.trained(frozen_too=True).values() if not p.requires_grad]
    if not frozen:
        yield
        return
    kept = {
        parameter: [piece.clone() for piece in _pieces(engine, parameter)] for parameter in frozen
    }
    yield
    for parameter, values in kept.items():
        pieces = _pieces(engine, parameter)
        for piece, value in zip(pieces, values, strict=False):
            piece.copy_(value)
        for piece in pieces[len(values) :]:  # states that this step has made
            piece.zero_()
    access.release(engine.engine, engine.zero_stage)


def _pieces(engine: Engine, parameter: nn.Parameter) -> list[Tensor]:
    """This rank's parts: the module's weight, the master's, then the states by name."""
    layout = engine.layout
    found: list[Tensor | None]
    found = [parameter.detach()] if engine.zero_stage < 3 else [layout.weight_piece(parameter)]
    found.append(layout.piece(parameter, layout.flats))
    where = layout.fragments.get(parameter)
    if where is not None and engine.base_optimizer is not None:
        flat = layout.flats[where.flat]
        state = engine.base_optimizer.state.get(flat, {})
        for key in sorted(state):
            value = state[key]
            if getattr(value, "shape", None) == flat.shape:
                values = [value] * len(layout.flats)
                found.append(layout.piece(parameter, values))
    return [piece for piece in found if piece is not None]
