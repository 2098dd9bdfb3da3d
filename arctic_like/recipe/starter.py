"""A commented starting recipe, written from the fields' own documentation.

Prose stands behind `# `; a key that has its default behind `#`, ready to be uncommented.
"""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from arctic_like import registry
from arctic_like.config.base import Config
from arctic_like.config.docs import attribute_docs
from arctic_like.config.interval import Interval
from arctic_like.config.shape import PLAIN, Shape, shapes
from arctic_like.recipe.canonical import chosen
from arctic_like.recipe.tree import Origin, node_of
from arctic_like.recipe.yaml_tree import inline_yaml

WIDTH = 80


def starting_recipe(trainer: type[registry.Part]) -> str:
    """YAML text for a trainer: what has no useful default is stated, all else is a comment."""
    head = [
        f"# A recipe for the trainer {trainer.name!r}: {registry.summary(trainer)}".rstrip(": "),
        "# `arctic-train FILE.yaml` runs it, `arctic-train validate FILE.yaml` checks it.",
        "# Keys behind a # have their defaults; take the # away to change one.",
        "",
    ]
    config = trainer.config_type
    stated = {"type": trainer.name, **_fitting(config, trainer)}
    body = _map(config, stated, (trainer,), 0)
    return "\n".join([*_fold(head), *body]) + "\n"


def _fitting(config: type[Config], trainer: type[registry.Part]) -> dict[str, Any]:
    """The config's example without the parts that this trainer does not work with."""
    found: dict[str, Any] = {}
    for name, value in config.example.items():
        shape = shapes(config)[name]
        if isinstance(value, list) and shape.items is not None:
            value = [
                entry
                for entry in value
                if chosen(shape.items, node_of(entry, Origin()), (trainer,))[0] is not None
            ]
        elif shape.choice is not None and chosen(shape, None, (trainer,))[1] == (trainer,):
            continue
        found[name] = value
    return found


def _map(
    config: type[Config], stated: dict[str, Any], owners: tuple[type, ...], depth: int
) -> Iterator[str]:
    hidden = {*config.not_yet, *config.no_effect}
    docs = attribute_docs(config)
    for name, field in config.model_fields.items():
        if name in hidden:
            continue
        yield from _prose(docs.get(name, ""), "  " * depth)
        yield from _field(name, field, shapes(config)[name], stated, owners, depth)
        if depth == 0:
            yield ""


def _field(
    name: str,
    field: FieldInfo,
    shape: Shape,
    stated: dict[str, Any],
    owners: tuple[type, ...],
    depth: int,
) -> Iterator[str]:
    indent = "  " * depth
    default = field.get_default(call_default_factory=True)
    nested, inner = _nested(shape, stated.get(name), owners)
    if nested is not None and not (default is None and name not in stated):
        config, example = nested
        part = inner[0].name if inner is not owners and issubclass(inner[0], registry.Part) else ""
        known = {key: value for key, value in example.items() if key in config.model_fields}
        own = {**config.example, **known, **({"type": part} if part else {})}
        yield f"{indent}{'' if own else '#'}{name}:"
        yield from _map(config, own, inner, depth + 1)
    elif name in stated:
        yield from (f"{indent}{line}" for line in inline_yaml({name: stated[name]}, flow=False))
    else:
        shown = None if field.is_required() else _plain(default)
        yield f"{indent}#{name}: {inline_yaml(shown)[0]}"


def _nested(
    shape: Shape, example: Any, owners: tuple[type, ...]
) -> tuple[tuple[type[Config], dict[str, Any]] | None, tuple[type, ...]]:
    """The config class of a field that is one map, with what the example states in it."""
    if shape == PLAIN or shape.items is not None or shape.values is not None:
        return None, owners
    node = node_of(example if isinstance(example, dict) else {}, Origin())
    config, inner = chosen(shape, node, owners)
    if config is None or (shape.choice is not None and inner is owners):
        return None, owners
    return (config, example if isinstance(example, dict) else {}), inner


def _plain(value: Any) -> Any:
    """A default as a recipe would state it."""
    if isinstance(value, Interval):
        return value.dump()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Config):
        return {key: _plain(getattr(value, key)) for key in value.model_fields_set}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _prose(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(" ".join(text.split()), WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"


def _fold(lines: list[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(line, WIDTH, subsequent_indent="# ") or [""]
