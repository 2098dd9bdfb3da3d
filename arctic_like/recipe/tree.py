"""A recipe before validation: a tree of values that know where they were written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Place = tuple[str | int, ...]
"""Keys and indices from the root down."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    file: str = ""
    """As messages show it: relative to the current folder if below it, or "command line"."""
    line: int | None = None
    folder: Path = Path()
    """What relative paths in it belong to."""


@dataclass(frozen=True)
class Node:
    """A value with its origin. `value` is a dict of nodes, a list of nodes, or a scalar.

    raw: the text to keep in a dump where it is not the value: an environment reference, unexpanded.
    from_environment: the whole value is an environment variable's text, whose type is open.
    broken: a problem with it is reported already.
    """

    value: Any
    origin: Origin = Origin()
    raw: str | None = None
    from_environment: bool = False
    broken: bool = False

    def with_value(self, value: Any) -> Node:
        """The same place with another value."""
        return replace(self, value=value)

    def plain(self, *, raw: bool = False) -> Any:
        """Ordinary Python values; with `raw` environment references stay unexpanded."""
        if isinstance(self.value, dict):
            return {key: node.plain(raw=raw) for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain(raw=raw) for node in self.value]
        return self.raw if raw and self.raw is not None else self.value

    def child(self, key: str | int) -> Node | None:
        """The node under a key or index, or None."""
        if isinstance(self.value, dict):
            found = self.value.get(key)
            return found if isinstance(found, Node) else None
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            entry = self.value[key]
            return entry if isinstance(entry, Node) else None
        return None

    def children(self) -> Iterator[tuple[str | int, Node]]:
        """Keys or indices with their nodes; nothing for a scalar."""
        if isinstance(self.value, dict):
            yield from self.value.items()
        elif isinstance(self.value, list):
            yield from enumerate(self.value)


def node_of(value: Any, origin: Origin) -> Node:
    """A tree of plain Python values (a recipe given as a dict), all with one origin."""
    if isinstance(value, dict):
        return Node({str(key): node_of(entry, origin) for key, entry in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([node_of(entry, origin) for entry in value], origin)
    return Node(value, origin)


def merge(base: Node, top: Node) -> Node:
    """`top` over `base`: maps merge key by key, anything else replaces."""
    if not (isinstance(base.value, dict) and isinstance(top.value, dict)):
        return top
    merged = dict(base.value)
    for key, node in top.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return top.with_value(merged)


def dotted(path: Place) -> str:
    """`("data", "sources", 0)` as `data.sources.0`."""
    return ".".join(str(part) for part in path)
