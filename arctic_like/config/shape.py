"""What stands behind a config's keys: the types, read once from the annotations.

The recipe's loader walks raw maps by these shapes, before anything is validated: to replace
aliases, to
make paths absolute, and to name the nearest known key.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Protocol, Union, get_args, get_origin, runtime_checkable

from arctic_like.config.base import Config
from arctic_like.config.values import OneOrMany, PathMark, UnnamedToo


@runtime_checkable
class Chooses(Protocol):
    """A marker that finds a config's class by the map's `type:` (`registry.Choice`)."""

    family: str

    def expand(self, value: Any) -> Any:
        """The full form of a short one (a bare string)."""
        ...


@dataclass(frozen=True)
class Shape:
    """One of: a nested config, a choice by `type:`, a list or map of a shape, a path, or a plain
    value."""

    config: type[Config] | None = None
    choice: Chooses | None = None
    items: Shape | None = None
    values: Shape | None = None
    path: PathMark | None = None
    one_or_many: OneOrMany | None = None


PLAIN = Shape()


@cache
def shapes(config: type[Config]) -> Mapping[str, Shape]:
    """Key → shape, for every key of a config class."""
    return types.MappingProxyType(
        {
            name: _shape(field.annotation, tuple(field.metadata))
            for name, field in config.model_fields.items()
        }
    )


def _shape(annotation: Any, metadata: tuple[Any, ...] = ()) -> Shape:
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = (*more, *metadata)
    for mark in metadata:
        if isinstance(mark, PathMark):
            return Shape(path=mark)
        if isinstance(mark, Chooses):
            return Shape(choice=mark)
    wrap = next((mark for mark in metadata if isinstance(mark, OneOrMany)), None)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and origin is None and issubclass(annotation, Config):
        return Shape(config=annotation)
    if origin in (Union, types.UnionType):
        found = [shape for member in arguments if (shape := _shape(member)) != PLAIN]
        return found[0] if len(found) == 1 else PLAIN
    if origin in (list, tuple) and arguments:
        return Shape(items=_shape(arguments[0]), one_or_many=wrap)
    if origin is dict:
        values = _shape(arguments[1])
        unnamed = any(isinstance(mark, UnnamedToo) for mark in metadata)
        return Shape(values=values, items=values.items if unnamed else None)
    return PLAIN
