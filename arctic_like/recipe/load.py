"""From a recipe's file and overrides to a validated `Recipe`, without any effect.

    files (bases first) ─ parse, canonical form ─ merge ─ overrides ─ references ─ paths ─
    validation

What is wrong is collected on the way and told all at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from arctic_like import registry
from arctic_like.config.shape import Shape
from arctic_like.errors import Problem, RecipeError
from arctic_like.recipe.canonical import absolute, canonical, resolve_paths
from arctic_like.recipe.code import DEFAULT, import_code
from arctic_like.recipe.explain import problems_of
from arctic_like.recipe.layers import read_layers
from arctic_like.recipe.overrides import Override, apply, parse_overrides
from arctic_like.recipe.references import expand
from arctic_like.recipe.tree import Node, Origin, merge, node_of
from arctic_like.recipe.yaml_tree import dump_yaml
from arctic_like.trainer.config import TrainerConfig


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. Two are equal if their trainers and configs are."""

    config: TrainerConfig
    trainer: type[registry.Part]
    path: Path | None = field(default=None, compare=False)
    """The file; None for a recipe that was given as a map."""
    name: str = field(default="recipe", compare=False)
    """For the run's folder and the trackers: the file's name without its suffix."""
    resolved: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """What `dump` writes, as a map."""

    def dump(self) -> str:
        """The recipe as YAML, in one file and loadable anywhere: bases merged, paths absolute.

        Environment references stand in it unexpanded. `load_recipe` reads an equal recipe from it.
        """
        return dump_yaml(dict(self.resolved))


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> Recipe:
    """Read, merge and validate a recipe: a file's path, or a map whose paths belong to the
    current folder.

    overrides: `key=value` texts as on the command line. Nothing is written and no library is
    loaded but what
    the user's own code imports. Raises RecipeError with everything that is wrong.
    """
    problems: list[Problem] = []
    layers, path = _layers(source, problems)
    changes = parse_overrides(overrides, problems)
    if any(change.keys[0] == "extends" for change in changes):
        problems.append(Problem("belongs in a file", "extends", file="command line"))
        changes = [change for change in changes if change.keys[0] != "extends"]
    types = _types(layers, changes)
    code = _code(types, path)
    if code is not None:
        import_code(code)
    trainer = _trainer(types)
    root = _canonical_root(layers, changes, types, trainer, problems)
    if code is not None:
        stated = root.child("code") or root
        root = root.with_value({**root.value, "code": Node(str(code), stated.origin)})
    shape, owners = Shape(config=trainer.config_type), (trainer,)
    root = expand(root, problems, shape=shape, owners=owners)
    # once more: only now it is known what stands where a reference stood
    root = canonical(root, shape, types=root, owners=owners, problems=problems)
    root = resolve_paths(root, shape, owners=owners)
    config = _validated(root, shape, owners, problems)
    return Recipe(config, trainer, path, _name(path), root.plain(raw=True))


def _layers(source: Any, problems: list[Problem]) -> tuple[list[Node], Path | None]:
    if isinstance(source, Mapping):
        root = node_of(dict(source), Origin("", None, Path.cwd()))
        if "extends" in root.value:
            raise RecipeError(Problem("belongs in a file, not in a map", "extends"))
        return [root], None
    path = Path(source)
    return read_layers(path, problems), Path(os.path.abspath(path))


def _types(layers: list[Node], changes: list[Override]) -> Node:
    """All layers merged as they stand: enough to read every `type:` from."""
    ignored: list[Problem] = []
    root = layers[0]
    for layer in layers[1:]:
        root = merge(root, layer)
    for change in changes:
        root = apply(root, change, problems=ignored)
    return expand(root, ignored)


def _code(types: Node, path: Path | None) -> Path | None:
    """The user's file: the one that `code:` names, or `train.py` beside the recipe if there is
    one."""
    stated = types.child("code")
    if stated is not None and isinstance(stated.value, str) and not stated.broken:
        found = Path(absolute(stated.value, stated.origin.folder))
        if not found.is_file():
            origin = stated.origin
            raise RecipeError(
                Problem(f"is {stated.value!r}, and there is no file {found}", "code", "",
                        origin.file, origin.line)
            )  # fmt: skip
        return found
    default = path.parent / DEFAULT if path is not None else None
    if stated is None and default is not None and default.is_file():
        return default
    return None


def _trainer(types: Node) -> type[registry.Part]:
    stated = types.child("type")
    name = stated.value if stated is not None else TrainerConfig.model_fields["type"].default
    origin = stated.origin if stated is not None else types.origin
    message, hint = f"is {name!r}, not a trainer's name", ""
    if isinstance(name, str):
        try:
            trainer = registry.lookup("trainer", name)
        except KeyError:
            message, hint = f"is {name!r}, which is no trainer", registry.unknown("trainer", name)
        else:
            if issubclass(trainer.config_type, TrainerConfig):
                return trainer
            message = (
                f"is {name!r}, whose config_type {trainer.config_type.__qualname__} is not derived "
                "from TrainerConfig"
            )
    raise RecipeError(Problem(message, "type", hint, origin.file, origin.line))


def _canonical_root(
    layers: list[Node],
    changes: list[Override],
    types: Node,
    trainer: type[registry.Part],
    problems: list[Problem],
) -> Node:
    shape, owners = Shape(config=trainer.config_type), (trainer,)
    forms = [
        canonical(layer, shape, types=types, owners=owners, problems=problems) for layer in layers
    ]
    root = forms[0]
    for form in forms[1:]:
        root = merge(root, form)
    for change in changes:
        root = apply(root, change, shape=shape, types=types, owners=owners, problems=problems)
    # a problem of the whole recipe has the file, and no line
    return Node(dict(root.value), replace(layers[-1].origin, line=None))


def _validated(
    root: Node, shape: Shape, owners: tuple[type, ...], problems: list[Problem]
) -> TrainerConfig:
    assert shape.config is not None
    try:
        config = shape.config.model_validate(root.plain(), context={"owners": owners})
    except ValidationError as error:
        problems = problems + problems_of(error, root, shape, owners)
    except RecipeError as error:
        problems = problems + error.problems
    if problems:
        raise RecipeError(_ordered(problems))
    assert isinstance(config, TrainerConfig)
    return config


def _ordered(problems: list[Problem]) -> list[Problem]:
    """Without repetitions, by file and line."""
    unique = list(dict.fromkeys(problems))
    files = list(dict.fromkeys(problem.file for problem in unique))
    return sorted(unique, key=lambda p: (files.index(p.file), p.line or 0))


def _name(path: Path | None) -> str:
    """A run's saved recipe has the name of its run."""
    if path is None:
        return "recipe"
    return path.parent.name if path.name == "recipe.yaml" and path.parent.name else path.stem
