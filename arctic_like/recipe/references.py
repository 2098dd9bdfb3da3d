"""`${other.key}`, `${env:NAME}` and `${env:NAME:default}` in a recipe's texts; `$${` is a plain
`${`.

A reference that is a whole value keeps its type, also a map's or a list's; inside a text it
becomes text.
An environment reference is expanded for the run only: dumps keep it as written.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

from arctic_like import registry
from arctic_like.config.shape import PLAIN, Shape
from arctic_like.errors import Problem
from arctic_like.recipe.canonical import Owners, chosen, shape_of
from arctic_like.recipe.tree import Node, Place, dotted

_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}")


def expand(
    root: Node, problems: list[Problem], *, shape: Shape = PLAIN, owners: Owners = ()
) -> Node:
    """The tree with all references expanded. Problems are added, their nodes marked as broken.

    With the root's `shape`, a reference may use a key's alias (`${optimizer.lr}`).
    """
    return _Expander(root, problems, shape, owners).node(root, (), ())


class _Expander:
    def __init__(self, root: Node, problems: list[Problem], shape: Shape, owners: Owners) -> None:
        self.root, self.problems = root, problems
        self.shape, self.owners = shape, owners
        self.reported: set[tuple[str, str, int | None]] = set()

    def node(self, node: Node, path: Place, asking: tuple[str, ...]) -> Node:
        if isinstance(node.value, dict):
            return node.with_value(
                {k: self.node(child, (*path, k), asking) for k, child in node.value.items()}
            )
        if isinstance(node.value, list):
            return node.with_value(
                [self.node(child, (*path, i), asking) for i, child in enumerate(node.value)]
            )
        if isinstance(node.value, str) and "${" in node.value:
            return self.text(node, path, asking)
        return node

    def text(self, node: Node, path: Place, asking: tuple[str, ...]) -> Node:
        whole = _REFERENCE.fullmatch(node.value)
        if whole and whole.group(1) is not None:
            found = self.reference(whole.group(1), node, path, asking)
            return found or replace(node, broken=True)
        value, raw, last, plain = "", "", 0, True
        for match in _REFERENCE.finditer(node.value):
            between = node.value[last : match.start()]
            last = match.end()
            if match.group(1) is None:
                value, raw, plain = value + between + "${", raw + between + "$${", False
                continue
            found = self.reference(match.group(1), node, path, asking)
            if found is None:
                return replace(node, broken=True)
            if isinstance(found.value, dict | list):
                self.report(
                    node, path, f"puts ${{{match.group(1)}}}, a map or a list, into a text", ""
                )
                return replace(node, broken=True)
            value += between + _as_text(found.value)
            raw += between + (found.raw if found.raw is not None else _as_text(found.value))
            plain = plain and found.raw is None
        rest = node.value[last:]
        return replace(node, value=value + rest, raw=None if plain else raw + rest)

    def reference(self, name: str, node: Node, path: Place, asking: tuple[str, ...]) -> Node | None:
        """What one reference stands for, at the place of the referring node."""
        name = name.strip()
        if name.startswith("env:"):
            return self.environment(name, node, path)
        if name in asking:
            chain = " → ".join((*asking, name))
            self.report(node, path, f"refers to itself: {chain}", "state one of them")
            return None
        target, place = self.find(name)
        if target is None:
            near = registry.nearest(name, _places(self.root, ()))
            hint = f"did you mean ${{{near}}}?" if near else (
                f"state `{name}`, or write ${{env:{name}}} for an environment variable, "
                "$${ for a plain ${"
            )  # fmt: skip
            self.report(
                node, path, f"refers to ${{{name}}}, which this recipe does not state", hint
            )
            return None
        found = self.node(target, place, (*asking, name))
        return None if found.broken else found

    def environment(self, name: str, node: Node, path: Place) -> Node | None:
        _, variable, *default = name.split(":", 2)
        value = os.environ.get(variable, default[0] if default else None)
        if value is None:
            hint = f"set it, or give a default: ${{env:{variable}:default}}"
            self.report(
                node, path, f"needs the environment variable {variable}, which is not set", hint
            )
            return None
        return replace(node, value=value, raw="${" + name + "}", from_environment=True)

    def find(self, name: str) -> tuple[Node | None, Place]:
        """The node under a dotted name, aliases resolved, and its place."""
        node: Node | None = self.root
        shape, owners = self.shape, self.owners
        place: Place = ()
        for word in name.split("."):
            if node is None:
                break
            key: str | int = word
            if isinstance(node.value, list) and word.isdigit():
                key, shape = int(word), shape.items or PLAIN
            else:
                config, owners = chosen(shape, node, owners)
                key = config.aliases.get(word, word) if config is not None else word
                shape = shape_of(config, shape, key)
            node, place = node.child(key), (*place, key)
        return node, place

    def report(self, node: Node, path: Place, message: str, hint: str) -> None:
        """Add a problem, once for each place: several references may lead to the same."""
        origin = node.origin
        key = (dotted(path), origin.file, origin.line)
        if key not in self.reported:
            self.reported.add(key)
            self.problems.append(Problem(message, dotted(path), hint, origin.file, origin.line))


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _places(node: Node, path: Place) -> list[str]:
    found = [dotted(path)] if path else []
    for key, child in node.children():
        found += _places(child, (*path, key))
    return found
