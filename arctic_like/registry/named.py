"""Functions and classes by name: a dotted path, or a bare name from the recipe's `code:` file."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from arctic_like.errors import Problem, RecipeError

CODE = "arctic_code_"
"""How the modules of `code:` files begin (`recipe/code.py` gives them their names)."""


def find_object(path: str, *, place: str) -> Any:
    """What `path` names. Raises RecipeError where there is no such thing.

    place: the recipe's key, for the error.
    """
    if "." not in path:
        return _in_code(path, place)
    words = path.split(".")
    for count in range(len(words) - 1, 0, -1):
        name = ".".join(words[:count])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            # a module that is there but imports another that is not: say so
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
            continue
        for word in words[count:]:
            if not hasattr(found, word):
                raise RecipeError(_unknown(path, place, found, word))
            found = getattr(found, word)
        return found
    hint = "install it, put it beside the `code:` file, or check the spelling"
    raise RecipeError(Problem(f"is {path!r}, and there is no module {words[0]!r}", place, hint))


def _in_code(name: str, place: str) -> Any:
    modules = [module for key, module in list(sys.modules.items()) if key.startswith(CODE)]
    for module in reversed(modules):
        if hasattr(module, name):
            return getattr(module, name)
    hint = "name the file that defines it in `code:`, or give its dotted path"
    raise RecipeError(Problem(f"is {name!r}, which no `code:` file defines", place, hint))


def _unknown(path: str, place: str, found: Any, word: str) -> Problem:
    from arctic_like.registry import nearest

    near = nearest(word, [name for name in dir(found) if not name.startswith("_")])
    where = getattr(found, "__name__", str(found))
    hint = f"did you mean {path.rpartition('.')[0]}.{near}?" if near else ""
    return Problem(f"is {path!r}, and {where} has no {word!r}", place, hint)
