"""`optimizer.lr=1e-5`, `data.sources.0.split=train`, `checkpoint=[]`: changes from the command
line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_like.config.shape import PLAIN, Shape, shapes
from arctic_like.errors import Problem, RecipeError
from arctic_like.recipe.canonical import Owners, canonical, chosen
from arctic_like.recipe.tree import Node, Origin, Place, dotted, merge
from arctic_like.recipe.yaml_tree import parse_yaml

PLACE = "command line"
_OVERRIDE = re.compile(r"([^\s=]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One `key=value`, its key split and its value parsed as YAML."""

    text: str
    keys: tuple[str, ...]
    value: Node


def parse_overrides(texts: Iterable[str], problems: list[Problem]) -> list[Override]:
    """Split and parse; what is wrong is added to `problems`. Relative paths belong to the current
    folder."""
    found = []
    for text in texts:
        match = _OVERRIDE.fullmatch(text)
        if match is None or not all(match.group(1).split(".")):
            problems.append(
                Problem(
                    f"{text!r} is no override",
                    hint="write key=value, as in train_iters=50",
                    file=PLACE,
                )
            )
            continue
        key, value = match.groups()
        try:
            node = parse_yaml(value, Origin(PLACE, None, Path.cwd()), problems)
        except RecipeError as error:
            problems += [
                Problem(f"the value of {key}= {p.message}", hint=p.hint, file=PLACE)
                for p in error.problems
            ]
            continue
        if not value.strip():
            node = node.with_value(None)
        found.append(Override(text, tuple(key.split(".")), node))
    return found


def apply(
    root: Node,
    override: Override,
    *,
    shape: Shape = PLAIN,
    types: Node | None = None,
    owners: Owners = (),
    problems: list[Problem],
) -> Node:
    """`root` with one override: maps merge, anything else is replaced."""
    return _Application(override, problems).put(root, shape, types, owners, ())


class _Application:
    def __init__(self, override: Override, problems: list[Problem]) -> None:
        self.override, self.problems = override, problems

    def put(
        self,
        node: Node | None,
        shape: Shape,
        types: Node | None,
        owners: Owners,
        done: Place,
    ) -> Node:
        rest = self.override.keys[len(done) :]
        if not rest:
            value = canonical(
                self.override.value,
                shape,
                types=types,
                owners=owners,
                problems=self.problems,
                path=done,
            )
            return merge(node, value) if node is not None else value
        if node is not None and isinstance(node.value, list):
            return self.into_list(node, shape, types, owners, done, rest[0])
        if shape.items is not None:
            empty = Node([], self.override.value.origin)
            return self.into_list(empty, shape, types, owners, done, rest[0])
        if node is not None and not isinstance(node.value, dict) and node.value is not None:
            self.report(done, f"is {node.value!r}, not a map; it has no {rest[0]!r}")
            return node
        return self.into_map(node, shape, types, owners, done, rest[0])

    def into_map(
        self, node: Node | None, shape: Shape, types: Node | None, owners: Owners,
        done: Place, key: str,
    ) -> Node:  # fmt: skip
        config, inner = chosen(shape, types if types is not None else node, owners)
        name = config.aliases.get(key, key) if config is not None else key
        below = shapes(config).get(name, PLAIN) if config is not None else shape.values or PLAIN
        below_types = None
        if types is not None:
            below_types = types.child(name) or types.child(key)
        children: dict[str, Any] = dict(node.value or {}) if node is not None else {}
        children[name] = self.put(children.get(name), below, below_types, inner, (*done, key))
        return Node(children, node.origin if node is not None else self.override.value.origin)

    def into_list(
        self, node: Node, shape: Shape, types: Node | None, owners: Owners,
        done: Place, key: str,
    ) -> Node:  # fmt: skip
        count = len(node.value)
        if not key.isdigit() or int(key) >= count:
            entries = f"entries 0 to {count - 1}" if count else "no entries"
            what = "is a list and " if not key.isdigit() else ""
            self.report(done, f"{what}has {entries}, so there is no {dotted((*done, key))}")
            return node
        index = int(key)
        entry = node.value[index]
        entry_types = types.child(index) if types is not None else None
        changed = self.put(entry, shape.items or PLAIN, entry_types or entry, owners, (*done, key))
        return node.with_value([*node.value[:index], changed, *node.value[index + 1 :]])

    def report(self, done: Place, message: str) -> None:
        hint = f"in the override {self.override.text}"
        self.problems.append(Problem(message, dotted(done), hint, PLACE))
