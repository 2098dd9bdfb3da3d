"""A recipe's file with the files that it extends, base first."""

from __future__ import annotations

from pathlib import Path

from arctic_like import registry
from arctic_like.errors import Problem, RecipeError
from arctic_like.recipe.canonical import absolute
from arctic_like.recipe.references import expand
from arctic_like.recipe.tree import Node
from arctic_like.recipe.yaml_tree import read_yaml


def read_layers(path: Path, problems: list[Problem], above: tuple[Path, ...] = ()) -> list[Node]:
    """The maps of a file's bases and of the file itself, later ones winning.

    Raises RecipeError where a file is missing, is no YAML, holds no map, or extends itself.
    """
    shown = shown_path(path)
    if not path.is_file():
        raise RecipeError(_missing(path, shown))
    root = read_yaml(path, shown, problems)
    if not isinstance(root.value, dict):
        raise RecipeError(
            Problem("holds no map of keys and values", file=shown, line=root.origin.line)
        )
    own = dict(root.value)
    bases = _bases(own.pop("extends", None), problems)
    layers: list[Node] = []
    here = (*above, path.resolve())
    for base, place in bases:
        if base.resolve() in here:
            names = [shown_path(entry) for entry in (*here, base)]
            raise RecipeError(
                Problem(
                    "extends itself: " + " → ".join(names), "extends", "", shown, place.origin.line
                )
            )
        if not base.is_file():
            problem = _missing(base, shown_path(base))
            raise RecipeError(
                Problem(
                    f"{problem.file}: {problem.message}",
                    "extends",
                    problem.hint,
                    shown,
                    place.origin.line,
                )
            )
        layers += read_layers(base, problems, here)
    return [*layers, root.with_value(own)]


def shown_path(path: Path) -> str:
    """A path as messages show it: relative to the current folder where it lies below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _bases(node: Node | None, problems: list[Problem]) -> list[tuple[Path, Node]]:
    if node is None:
        return []
    entries = node.value if isinstance(node.value, list) else [node]
    found = []
    for entry in entries:
        entry = expand(entry, problems)
        if entry.broken:
            continue
        if not isinstance(entry.value, str):
            problems.append(
                Problem("names no file", "extends", "write a path or a list of paths",
                        entry.origin.file, entry.origin.line)
            )  # fmt: skip
            continue
        found.append((Path(absolute(entry.value, entry.origin.folder)), entry))
    return found


def _missing(path: Path, shown: str) -> Problem:
    if path.is_dir():
        return Problem("is a folder, not a recipe", file=shown, hint="name a .yaml file")
    return Problem("there is no such file", file=shown, hint=_near_file(path))


def _near_file(path: Path) -> str:
    """The recipe that may have been meant: another suffix, or a similar name in the same folder."""
    for suffix in (".yaml", ".yml"):
        other = path.with_name(path.name + suffix)
        if other.is_file():
            return f"did you mean {shown_path(other)}?"
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {shown_path(folder)} either"
    known = [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml")]
    near = registry.nearest(path.name, known) or registry.nearest(path.name + ".yaml", known)
    return f"did you mean {shown_path(folder / near)}?" if near else ""
