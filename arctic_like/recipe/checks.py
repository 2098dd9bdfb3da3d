"""What a valid recipe states in vain, or states before its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from arctic_like.config.base import Config
from arctic_like.errors import Problem
from arctic_like.recipe.tree import Place, dotted


def run_time_refusals(config: Config) -> list[Problem]:
    """Keys with a value that this version cannot carry out: refused before the run, not at
    validation."""
    return [
        Problem(f"is {_shown(getattr(owner, key))}, which is not part of this version",
                dotted((*path, key)), instead)
        for path, owner in _configs(config, ())
        for key, instead in type(owner).not_yet.items()
        if _departs(owner, key)
    ]  # fmt: skip


def warnings(config: Config) -> list[Problem]:
    """Keys that are accepted without an effect, as the recipe states them."""
    return [
        Problem("has no effect", dotted((*path, key)), why)
        for path, owner in _configs(config, ())
        for key, why in type(owner).no_effect.items()
        if key in owner.model_fields_set
    ]


def _departs(owner: Config, key: str) -> bool:
    default = type(owner).model_fields[key].get_default(call_default_factory=True)
    return key in owner.model_fields_set and getattr(owner, key) != default


def _configs(value: Any, path: Place) -> Iterator[tuple[Place, Config]]:
    """All configs in a config, outermost first, with their places."""
    if isinstance(value, Config):
        yield path, value
        for name in type(value).model_fields:
            yield from _configs(getattr(value, name), (*path, name))
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from _configs(entry, (*path, i))
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _configs(entry, (*path, key))


def _shown(value: Any) -> str:
    return (
        f"{value!r}"
        if isinstance(value, str)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
