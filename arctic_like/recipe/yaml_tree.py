"""YAML text to a tree that knows its lines, by the rules of YAML 1.2's core schema.

PyYAML reads YAML 1.1, where `no` is false, `1e-5` is text, `012` is ten and `1:30` is ninety.
Here `no` and
`1:30` are text, `1e-5` is a number, and `012` is refused, as readers disagree about it. Duplicate
keys are
problems with both their lines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from arctic_like.errors import Problem, RecipeError
from arctic_like.recipe.tree import Node, Origin, Place, dotted

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "!octal"
_RESOLVERS = [
    (_TAG + "null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    (_TAG + "bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    (_AMBIGUOUS, re.compile(r"[-+]?0[0-9]+"), list("-+0")),
    (_TAG + "int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), list("-+0123456789")),
    (
        _TAG + "float",
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
            r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
        ),
        list("-+.0123456789"),
    ),
    (_TAG + "merge", re.compile(r"<<"), ["<"]),
]


def _install(kind: Any) -> None:
    kind.yaml_implicit_resolvers = {}
    for tag, pattern, first in _RESOLVERS:
        kind.add_implicit_resolver(tag, re.compile(rf"(?:{pattern.pattern})\Z"), first)


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's plain scalars."""


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that `_Loader` would read as something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent lists below their key."""
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # unquoted and in single quotes, PyYAML folds these line breaks into spaces when it reads them
    style = '"' if any(c in text for c in "\x85\u2028\u2029\r") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_install(_Loader)
_install(_Dumper)
_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Block YAML in the order of the maps; `parse_yaml` reads the same values back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def inline_yaml(value: Any, *, flow: bool = True) -> list[str]:
    """A value as lines of YAML: one line of flow style, or a block."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
        default_flow_style=flow,
    )
    return str(text).removesuffix("...\n").rstrip("\n").split("\n")


def parse_yaml(text: str, origin: Origin, problems: list[Problem]) -> Node:
    """The tree of a YAML text. Duplicate keys and doubtful scalars are added to `problems`.

    Raises RecipeError where the text is no YAML, with line, column and what the parser expected.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_problem(error, origin)) from None
    finally:
        loader.dispose()
    if root is None:
        return Node({}, origin)
    return _Reader(origin, problems).read(root, ())


def read_yaml(path: Path, shown: str, problems: list[Problem]) -> Node:
    """The tree of a YAML file. Raises RecipeError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(Problem(f"is not UTF-8 text: {error.reason}", file=shown)) from None
    except OSError as error:
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=shown)) from None
    return parse_yaml(text, Origin(shown, 1, path.resolve().parent), problems)


def parse_scalar(text: str) -> Any:
    """What a plain scalar means; text where it is none, or is doubtful."""
    problems: list[Problem] = []
    try:
        value = parse_yaml(text, Origin(), problems).value
    except RecipeError:
        return text
    return text if problems or isinstance(value, dict | list) else value


class _Reader:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, origin: Origin, problems: list[Problem]) -> None:
        self.file, self.folder, self.problems = origin.file, origin.folder, problems
        self.first = origin.line
        self.open: set[int] = set()

    def read(self, node: yaml.Node, path: Place) -> Node:
        if id(node) in self.open:
            self.report(node, path, "contains itself through an anchor", "write the value out")
            return Node(None, self.origin(node), broken=True)
        self.open.add(id(node))
        try:
            return Node(self.value(node, path), self.origin(node))
        finally:
            self.open.discard(id(node))

    def value(self, node: yaml.Node, path: Place) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self.read(entry, (*path, i)) for i, entry in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: Place) -> dict[str, Node]:
        found: dict[str, Node] = {}
        lines: dict[str, int | None] = {}
        inherited: dict[str, Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for key, value in self.merged(value_node, path).items():
                    inherited.setdefault(key, value)
                continue
            key = self.key(key_node, path)
            value = self.read(value_node, (*path, key))
            line = self.line(key_node)
            if key in found:
                self.report(
                    key_node,
                    (*path, key),
                    f"stands twice, in line {lines[key]} and here",
                    "keep one",
                )
                continue
            # the key's line is where a reader looks, also where the value begins further down
            found[key] = Node(
                value.value, Origin(self.file, line, self.folder), broken=value.broken
            )
            lines[key] = line
        return {**{k: v for k, v in inherited.items() if k not in found}, **found}

    def merged(self, node: yaml.Node, path: Place) -> dict[str, Node]:
        entries = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[str, Node] = {}
        for entry in entries:
            if not isinstance(entry, yaml.MappingNode):
                self.report(node, path, "`<<` merges maps only", "")
                continue
            for key, value in self.mapping(entry, path).items():
                result.setdefault(key, value)
        return result

    def key(self, node: yaml.Node, path: Place) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self.report(node, path, "a key must be a word, not a map or a list", "")
            return "?"
        return str(node.value)

    def scalar(self, node: yaml.Node, path: Place) -> Any:
        text = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            return int(text, 0) if text[:2].lower() in ("0x", "0o") else int(text)
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if node.tag == _AMBIGUOUS:
            decimal = text.lstrip("+-").lstrip("0") or "0"
            hint = f"write {decimal}, or '{text}' in quotes for text"
            self.report(
                node, path, f"is {text}, which readers of YAML take for octal or decimal", hint
            )
        elif kind not in ("str", "merge"):
            self.report(node, path, f"has the tag {node.tag!r}; recipes hold plain values", "")
        return text

    def line(self, node: yaml.Node) -> int | None:
        """The line in the file; None for a text that is not in one (an override)."""
        return None if self.first is None else int(node.start_mark.line) + self.first

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self.file, self.line(node), self.folder)

    def report(self, node: yaml.Node, path: Place, message: str, hint: str) -> None:
        self.problems.append(Problem(message, dotted(path), hint, self.file, self.line(node)))


def _syntax_problem(error: yaml.YAMLError, origin: Origin) -> Problem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    message = f"is not valid YAML: {what}" + (f" ({context})" if context else "")
    line = None
    if mark is not None:
        line = None if origin.line is None else mark.line + origin.line
        message += f", at column {mark.column + 1}"
        snippet = mark.get_snippet(indent=4, max_length=72) if mark.buffer else None
        if snippet:
            message += "\n" + snippet
    hint = ""
    if "\\t" in str(what) or "'\\t'" in str(error):
        hint = "indent with spaces: YAML allows no tab there"
    elif "mapping values are not allowed" in str(what):
        hint = "put a text that holds `: ` in quotes, or check the indentation"
    return Problem(message, hint=hint, file=origin.file, line=line)
