"""Raw maps in their one canonical form: aliases replaced, short forms written out, paths absolute.

Walks a tree by the shapes of its config classes. A map's class depends on its `type:`, which
another
layer may state; `types` is all layers merged, from which types are read.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from arctic_like.config.base import Config
from arctic_like.config.shape import PLAIN, Chooses, Shape, shapes
from arctic_like.config.values import PathMark
from arctic_like.errors import Problem
from arctic_like.recipe.tree import Node, Place, dotted
from arctic_like.recipe.yaml_tree import parse_scalar
from arctic_like.registry.choice import Choice

Owners = tuple[type, ...]
_REFERENCE = re.compile(r"\$\{[^{}]*\}")


def chosen(shape: Shape, types: Node | None, owners: Owners) -> tuple[type[Config] | None, Owners]:
    """The config class of a map of this shape, and the owners of what is inside it."""
    if shape.config is not None:
        return shape.config, owners
    if not isinstance(shape.choice, Choice):
        return None, owners
    stated = types.child("type") if types is not None else None
    name = stated.value if stated is not None and isinstance(stated.value, str) else ""
    try:
        part, config = shape.choice.config_class(name, owners)
    except PydanticCustomError:
        return None, owners  # validation reports it
    return config, (part, *owners) if part is not None else owners


def shape_of(config: type[Config] | None, shape: Shape, key: str) -> Shape:
    """The shape of what stands under a key of a map."""
    if config is not None:
        return shapes(config).get(key, PLAIN)
    return shape.values or PLAIN


def canonical(
    node: Node,
    shape: Shape,
    *,
    types: Node | None,
    owners: Owners,
    problems: list[Problem],
    path: Place = (),
) -> Node:
    """One layer with aliases replaced and short forms written out."""
    if shape.choice is not None:
        node = _expanded(node, shape.choice)
        types = _expanded(types, shape.choice) if types is not None else None
    if shape.one_or_many is not None and not isinstance(node.value, list):
        node = node.with_value([node]) if node.value is not None else node
        if types is not None and not isinstance(types.value, list):
            types = types.with_value([types])
    if isinstance(node.value, list):
        if shape.items is None:
            return node
        # a list replaces the one below it, so its own entries say their types
        return node.with_value(
            [
                canonical(entry, shape.items, types=entry, owners=owners,
                          problems=problems, path=(*path, i))
                for i, entry in enumerate(node.value)
            ]
        )  # fmt: skip
    if not isinstance(node.value, dict):
        return node
    config, inner = chosen(shape, types, owners)
    children: dict[str, Node] = {}
    spelled: dict[str, str] = {}
    key: str
    for key, child in node.value.items():
        name = str(config.aliases.get(key, key)) if config is not None else key
        other = name if name in node.value else spelled.get(name)
        if name != key and other is not None:
            problems.append(
                Problem(
                    f"and {other!r} are the same key", dotted((*path, key)), f"keep {other!r}",
                    child.origin.file, child.origin.line,
                )
            )  # fmt: skip
            continue
        spelled[name] = key
        below = shape_of(config, shape, name)
        below_types = types.child(name) if types is not None else None
        if below_types is None and types is not None:
            below_types = types.child(key)
        children[name] = canonical(
            child, below, types=below_types, owners=inner, problems=problems, path=(*path, name)
        )
    return node.with_value(children)


def resolve_paths(node: Node, shape: Shape, *, owners: Owners, untyped: bool = False) -> Node:
    """A merged and expanded tree with the paths in it absolute, each by the file that states it."""
    if shape.path is not None and isinstance(node.value, str):
        return _absolute(node, shape.path)
    if isinstance(node.value, list):
        inside = shape.items or PLAIN
        return node.with_value(
            [resolve_paths(e, inside, owners=owners, untyped=untyped) for e in node.value]
        )
    if not isinstance(node.value, dict):
        # inside an open map no field says the type of an environment variable's text
        return (
            replace(node, value=parse_scalar(node.value))
            if (untyped and node.from_environment)
            else node
        )
    config, inner = chosen(shape, node, owners)
    untyped = untyped or (config is None and shape.choice is None)
    return node.with_value(
        {
            key: resolve_paths(child, shape_of(config, shape, key), owners=inner, untyped=untyped)
            for key, child in node.value.items()
        }
    )


def absolute(text: str, folder: Path) -> str:
    """A path as text, absolute, without `..` and `~` (but of a user that there is not)."""
    return os.path.normpath(folder / os.path.expanduser(text))


def _expanded(node: Node, choice: Chooses) -> Node:
    """The map that a short form stands for. A reference may stand for either: it stays."""
    if isinstance(node.value, str) and node.raw is None and _REFERENCE.fullmatch(node.value):
        return node
    value = choice.expand(node.value)
    if value is node.value or not isinstance(value, dict):
        return node
    return Node({key: node.with_value(entry) for key, entry in value.items()}, node.origin)


def _absolute(node: Node, mark: PathMark) -> Node:
    folder = node.origin.folder
    if mark.name_too and "://" in node.value:
        return replace(node, value=_absolute_url(node.value, folder))
    if mark.name_too and not _looks_like_path(node.value, folder):
        return node
    result: dict[str, Any] = {"value": absolute(node.value, folder)}
    if node.raw is not None and not os.path.isabs(os.path.expanduser(node.value)):
        result["raw"] = f"{folder}/{node.raw}"
    return replace(node, **result)


def _absolute_url(url: str, folder: Path) -> str:
    """A URL as it is, but for a database file that is named by a relative path."""
    protocol, _, path = url.partition(":///")
    if not protocol.startswith("sqlite") or not path or path.startswith(("/", ":")):
        return url
    return f"{protocol}:///{absolute(path, folder)}"


def _looks_like_path(text: str, folder: Path) -> bool:
    """Whether a text that may be a Hub name is a path; a `:split` behind it does not count."""
    if text.startswith(("./", "../", "~", "/")) or text in (".", ".."):
        return True
    bare = text.partition(":")[0]
    return bool(bare) and ("*" in bare or (folder / text).exists() or (folder / bare).exists())
