"""Functions and classes by name: a dotted path, or a bare name from the recipe's `code:` file."""

from __future__ import annotations

import sys
from typing import Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.registry.dotted import import_object

CODE = "arctic_code_"
"""How the modules of `code:` files begin (`recipe/code.py` gives them their names)."""


def find_object(path: str, *, place: str) -> Any:
    """What `path` names. Raises RecipeError where there is no such thing.

    place: the recipe's key, for the error.
    """
    if "." not in path:
        return _in_code(path, place)
    return import_object(path, place=place)


def _in_code(name: str, place: str) -> Any:
    modules = [module for key, module in list(sys.modules.items()) if key.startswith(CODE)]
    for module in reversed(modules):
        if hasattr(module, name):
            return getattr(module, name)
    hint = "name the file that defines it in `code:`, or give its dotted path"
    raise RecipeError(Problem(f"is {name!r}, which no `code:` file defines", place, hint))
