"""Pydantic's validation errors as our sentences: place, value, rule, way out."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from arctic_like import registry
from arctic_like.config.base import Config
from arctic_like.config.shape import PLAIN, Shape, shapes
from arctic_like.config.values import shown
from arctic_like.errors import Problem
from arctic_like.recipe.canonical import Owners, chosen
from arctic_like.recipe.tree import Node, Place, dotted

_RULES = {
    "int_type": "a whole number", "int_parsing": "a whole number",
    "int_from_float": "a whole number", "int_parsing_size": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "bool_parsing": "true or false",
    "string_type": "text", "list_type": "a list", "tuple_type": "a list", "dict_type": "a map",
    "model_type": "a map", "model_attributes_type": "a map", "path_type": "a path",
    "none_required": "empty", "string_pattern_mismatch": "text of the form {pattern}",
    "literal_error": "{expected}", "enum": "{expected}",
}  # fmt: skip
_LISTED = 16
"""Most keys that a message lists."""
_LIMITS = {
    "greater_than": "which must be more than {gt}",
    "greater_than_equal": "which must be at least {ge}",
    "less_than": "which must be less than {lt}",
    "less_than_equal": "which must be at most {le}",
    "multiple_of": "which must be a multiple of {multiple_of}",
    "too_short": "with fewer than {min_length} entries",
    "too_long": "with more than {max_length} entries",
    "string_too_short": "shorter than {min_length} characters",
    "string_too_long": "longer than {max_length} characters",
}


def problems_of(error: ValidationError, root: Node, shape: Shape, owners: Owners) -> list[Problem]:
    """All problems of a failed validation, in the order of the file, each with its line."""
    found: dict[tuple[Place, str], tuple[str, list[str]]] = {}
    for entry in error.errors(include_url=False, include_input=True):
        context = entry.get("ctx", {})
        place = _place(entry["loc"], root, missing=entry["type"] == "missing")
        if context.get("place"):
            place = (*place, *(_key(part) for part in str(context["place"]).split(".")))
        if _is_broken(root, place):
            continue
        if entry["type"] == "extra_forbidden":
            message, hint = _unknown_key(place, root, shape, owners)
        else:
            stated = _stated(root, place, entry.get("input"))
            message, hint = _sentence(entry, context, stated), str(context.get("hint", ""))
        # the branches of a union fail one by one at the same place: one sentence with all rules
        head, comma, rule = message.partition(", not ")
        hints, rules = found.setdefault((place, head), (hint, []))
        if not hints and hint:
            found[(place, head)] = (hint, rules)
        if comma and rule not in rules:
            rules.append(rule)
    result = []
    for (place, head), (hint, rules) in found.items():
        message = head + (f", not {' or '.join(rules)}" if rules else "")
        origin = _origin(root, place)
        result.append(Problem(message, dotted(place), hint, origin.file, origin.line))
    return result


def _stated(root: Node, place: Place, otherwise: Any) -> Any:
    """The value as written, which a validator may have changed before it was refused."""
    node: Node | None = root
    for part in place:
        node = node.child(part) if node is not None else None
    return otherwise if node is None else node.plain(raw=True)


def _sentence(entry: Any, context: dict[str, Any], value: Any) -> str:
    kind = entry["type"]
    if kind == "wrong":
        return str(context["message"])
    if kind == "missing":
        return "is required"
    if kind in _RULES:
        return f"is {shown(value)}, not {_RULES[kind].format(**context)}"
    if kind in _LIMITS:
        return f"is {shown(value)}, {_LIMITS[kind].format(**context)}"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", "")) or str(entry["msg"])
    return f"is {shown(value)}: {entry['msg']}"


def _place(loc: Place, root: Node, *, missing: bool) -> Place:
    """The error's place among the recipe's keys: without the names that pydantic gives to union
    branches."""
    place: list[str | int] = []
    node: Node | None = root
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        child = node.child(part) if node is not None else None
        if child is not None:
            place.append(part)
            node = child
        elif node is None or (last and missing) or _is_default_part(node, part):
            place.append(part)
            node = None
        elif isinstance(node.value, dict) and not last and _branch(part):
            continue
    return tuple(place)


def _branch(part: str | int) -> bool:
    return isinstance(part, str) and not part.isidentifier()


def _is_default_part(node: Node, part: str | int) -> bool:
    """Whether the error lies in a map that the recipe leaves to its default."""
    return isinstance(node.value, dict) and isinstance(part, str) and part.isidentifier()


def _key(part: str) -> str | int:
    return int(part) if part.isdigit() else part


def _unknown_key(place: Place, root: Node, shape: Shape, owners: Owners) -> tuple[str, str]:
    config, name = _config_at(place[:-1], root, shape, owners)
    if config is None:
        return "is not a known key", ""
    key = str(place[-1])
    message = f"is not a key of {name}" if name else "is not a known key"
    if near := registry.nearest(key, [*config.model_fields, *config.aliases]):
        return message, f"did you mean {near!r}?"
    if elsewhere := _elsewhere(key, config, root, shape, owners, place[:-1]):
        return message, f"did you mean {elsewhere!r}?"
    if len(config.model_fields) <= _LISTED:
        return message, f"known: {', '.join(sorted(config.model_fields))}"
    return message, "`arctic-train init` prints all keys"


def _elsewhere(
    key: str, config: type[Config], root: Node, shape: Shape, owners: Owners, place: Place
) -> str:
    """A key of that very name, or nearly, in one of the maps inside this one."""
    found: dict[str, str] = {}
    for field, below in shapes(config).items():
        if below.config is None and below.choice is None:
            continue
        inner, _ = _config_at((*place, field), root, shape, owners)
        for name in (*inner.model_fields, *inner.aliases) if inner is not None else ():
            found.setdefault(name, dotted((*place, field, name)))
    found.pop("type", None)
    return found[near] if (near := registry.nearest(key, found)) else ""


def _config_at(
    place: Place, root: Node, shape: Shape, owners: Owners
) -> tuple[type[Config] | None, str]:
    """The config class at a place, and what to call it."""
    node: Node | None = root
    config, inner = chosen(shape, node, owners)
    name = f"the trainer {owners[0].name!r}" if owners and hasattr(owners[0], "name") else ""
    for part in place:
        node = node.child(part) if node is not None else None
        if isinstance(part, int):
            shape = shape.items or PLAIN
        else:
            shape = shapes(config).get(part, PLAIN) if config is not None else shape.values or PLAIN
        before = inner
        config, inner = chosen(shape, node, inner)
        name = str(part)
        if inner is not before and issubclass(inner[0], registry.Part):
            name = f"the {inner[0].family} {inner[0].name!r}"
    return config, name


def _origin(root: Node, place: Place) -> Any:
    """Where the deepest stated part of a place was written; the file alone for the whole recipe."""
    node = root
    origin = node.origin
    for part in place:
        child = node.child(part)
        if child is None:
            return origin
        node, origin = child, child.origin
    return origin


def _is_broken(root: Node, place: Place) -> bool:
    node: Node | None = root
    for part in place:
        node = node.child(part) if node is not None else None
        if node is not None and node.broken:
            return True
    return False
