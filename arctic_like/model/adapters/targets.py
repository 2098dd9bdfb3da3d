"""Which modules of a model an adapter can be put on, and what to say where it fits nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem

if TYPE_CHECKING:
    from torch import nn

_KEYS = ("target_modules", "modules_to_save", "feedforward_modules")
EVERYWHERE = "all-linear"


def candidates(model: nn.Module) -> list[str]:
    """The last parts of the names of linear layers and embeddings, each once: `q_proj`, …"""
    kinds = ("Linear", "Conv1D", "Embedding")
    found = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(kind in type(module).__name__ for kind in kinds)
    ]
    return list(dict.fromkeys(found))


def misplaced(model: nn.Module, config: Any, *, place: str) -> list[Problem]:
    """A problem for every name in peft's config that no module of the model has.

    place: where the recipe states the config. peft itself would pass over one name of several.
    """
    names = [name for name, _ in model.named_modules() if name]
    return [
        Problem(
            f"{what} {', '.join(map(repr, sorted(missing)))}, which no module of this "
            f"{model.config.model_type} is called",  # type: ignore[union-attr]
            place=f"{place}.{key}",
            hint=f"there are {', '.join(candidates(model))}; or all-linear",
        )
        for key, what, missing in _missing(config, names)
    ]


def foreign(model: nn.Module, config: Any) -> str:
    """The modules that an adapter wants and the model has not; empty where it has all."""
    names = [name for name, _ in model.named_modules() if name]
    missing = [name for _, _, its in _missing(config, names) for name in its]
    return ", ".join(sorted(missing))


def _missing(config: Any, names: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    for key in _KEYS:
        stated = getattr(config, key, None)
        if not stated or (isinstance(stated, str) and stated.lower() == EVERYWHERE):
            continue
        if isinstance(stated, str):
            if not any(re.fullmatch(stated, name) for name in names):
                yield key, "is the pattern", [stated]
            continue
        ends = [one for one in stated if not any(f".{name}".endswith(f".{one}") for name in names)]
        if ends:
            yield key, "names", ends
