"""Optimizers that live in packages of their own, imported when a recipe asks for them."""

from __future__ import annotations

import importlib
from typing import Any

from arctic_like.errors import Problem, RecipeError


def needed(module: str, *, optimizer: str, extra: str) -> Any:
    """The imported module. Raises RecipeError, at `optimizer.type`, naming the extra that has it."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a package with a library of its own
        name = module.partition(".")[0]
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(
            Problem(
                f"{optimizer} is the optimizer of {name}, which cannot be imported ({reason})",
                place="optimizer.type",
                hint=f"pip install 'arctic-like[{extra}]'",
            )
        ) from error
