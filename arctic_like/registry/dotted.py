"""Classes by their dotted path (`torch.optim.SGD`): the grammar, the import, the arguments.

`validate` looks at the grammar only, as an import would load torch or a user's package. The import
and the check of arguments against the class's own signature happen when the part is built.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from arctic_like.config.values import parse_number
from arctic_like.errors import Problem, RecipeError

PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$"
"""What a dotted path looks like, as a regular expression."""


def is_dotted(text: str) -> bool:
    """Whether a text is a dotted path: two or more identifiers, joined by dots."""
    return re.match(PATTERN, text) is not None


def import_class(path: str, *, place: str) -> type:
    """The class behind a dotted path: a module's, or one inside another class.

    Raises as `import_object`, and RecipeError where it is no class.
    """
    found = import_object(path, place=place)
    if not isinstance(found, type):
        raise RecipeError(
            Problem(f"is {path!r}, which is {type(found).__name__}, not a class", place)
        )
    return found


def import_object(path: str, *, place: str) -> Any:
    """What a dotted path names: anything in a module, or inside a class of it.

    place: the recipe's key, for the error. Raises RecipeError where there is no such module or no
    such name in it; what goes wrong inside a module that is there keeps its traceback.
    """
    found, rest = _import_longest(path, place=place)
    for word in rest:
        if not hasattr(found, word):
            raise RecipeError(_no_such_name(path, found, word, place))
        found = getattr(found, word)
    return found


def _import_longest(path: str, *, place: str) -> tuple[Any, list[str]]:
    """The longest prefix of `path` that is a module, and the words behind it."""
    words = path.split(".")
    for count in range(len(words) - 1, 0, -1):
        name = ".".join(words[:count])
        try:
            return importlib.import_module(name), words[count:]
        except ModuleNotFoundError as error:
            # a module that is there but imports another that is not: say so
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
    raise RecipeError(
        Problem(
            f"is {path!r}, and there is no module {words[0]!r}",
            place,
            "install it, put it beside the `code:` file, or give the full path as an import would: "
            f"{words[0]}.….{words[-1]}",
        )
    )


def _no_such_name(path: str, found: Any, word: str, place: str) -> Problem:
    from arctic_like.registry import nearest

    near = nearest(word, [name for name in dir(found) if not name.startswith("_")])
    where = getattr(found, "__name__", str(found))
    hint = f"did you mean {path.rpartition('.')[0]}.{near}?" if near else ""
    return Problem(f"is {path!r}, and {where} has no {word!r}", place, hint)


def parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """The named parameters of a class's constructor, in order, without `self`."""
    # the class itself may be decorated or have a metaclass; what is called is __init__
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter
        for name, parameter in list(signature.parameters.items())[1:]
        if parameter.kind in kinds
    }


def takes_any(cls: type) -> bool:
    """Whether a class's constructor has `**kwargs`, so that its arguments cannot be checked."""
    found = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)


def check_arguments(
    cls: type, arguments: Iterable[str], *, place: str, ours: Iterable[str] = ()
) -> None:
    """Raise RecipeError for every argument that the class does not take, and every one it needs.

    place: the map in the recipe that states them. ours: parameters that the recipe does not state,
    because they are filled in (the first one, `params` or `optimizer`, say).
    """
    from arctic_like.registry import nearest

    known, filled, given = parameters(cls), set(ours), list(arguments)
    takeable = [name for name in known if name not in filled]
    problems = []
    for name in given:
        if name not in takeable and not takes_any(cls):
            near = nearest(name, takeable)
            hint = (f"did you mean {near!r}? " if near else "") + f"it takes {', '.join(takeable)}"
            problems.append(
                Problem(f"is no argument of {cls.__qualname__}", f"{place}.{name}", hint)
            )
    for name in takeable:
        if known[name].default is inspect.Parameter.empty and name not in given:
            problems.append(
                Problem(f"is needed by {cls.__qualname__}", f"{place}.{name}", "state it")
            )
    if problems:
        raise RecipeError(problems)


def with_numbers(value: Any) -> Any:
    """A stated value with human numbers (`1e-4`, `5%`, `4Ki`) as numbers, also inside lists and maps."""
    if isinstance(value, dict):
        return {key: with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [with_numbers(entry) for entry in value]
    if isinstance(value, str):
        try:
            exact = parse_number(value)
        except ValueError:
            return value
        return exact.numerator if exact.denominator == 1 else float(exact)
    return value
