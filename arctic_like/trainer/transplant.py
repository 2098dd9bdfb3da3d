"""Weights from elsewhere into a learner that was just built, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import ArcticError
from arctic_like.model.transplant import Match, WeightsFromConfig, match

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.engine.deepspeed import Engine


def transplant(engine: Engine, begin: WeightsFromConfig | None) -> Match | None:
    """Fill the engine's weights by name and shape, and say what was taken. Collective.

    Rank 0 reads; one parameter is whole at a time. Raises what reading and matching raise, on all
    ranks.
    """
    if begin is None:
        return None
    from loguru import logger

    from arctic_like.checkpoint.reading import read_any

    found: dict[str, Tensor] = {}
    result: Match | None = None
    error: BaseException | None = None
    if engine.host.world.is_main:
        try:
            found = read_any(Path(begin.path))
            elsewhere = _never_exported(engine) - found.keys()
            own = {name: s for name, s in own_shapes(engine).items() if name not in elsewhere}
            result = match(own, {k: list(v.shape) for k, v in found.items()}, begin)
        except ArcticError as problem:
            error = problem
    engine.host.raise_together(error)
    result = engine.host.from_main(result)
    assert result is not None
    fill(engine, found, result.taken)
    logger.info(result.report(str(begin.path)))
    return result


def _never_exported(engine: Engine) -> set[str]:
    """Weights that only training needs, and exports do not hold."""
    return set(getattr(engine.module, "_keys_to_ignore_on_save", None) or ())


def own_shapes(engine: Engine) -> dict[str, list[int]]:
    """Name → whole shape of every weight and persistent buffer of a model; of an adapter over a base
    that the recipe brings back, of what is trained alone."""
    from arctic_like.engine.frozen_base import is_rebuilt

    names = engine.trained(frozen_too=True) if is_rebuilt(engine.module) else None
    shapes = engine.shapes().items()
    return {name: list(shape) for name, shape in shapes if names is None or name in names}


def fill(engine: Engine, found: dict[str, Any], taken: dict[str, str]) -> None:
    """Copy what rank 0 found into the engine's weights, rounded to their dtype. Collective."""
    import torch

    main = engine.host.world.is_main
    buffers = dict(engine.module.named_buffers())
    for name, source in taken.items():
        if name in buffers:
            value: Any = engine.host.from_main(found[source] if main else None)
            buffers[name].data.copy_(value)
            continue
        with engine.full_parameters([name], modify=True) as parameters:
            if main:
                with torch.no_grad():
                    parameters[name].data.copy_(found[source])
