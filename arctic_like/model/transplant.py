"""Weights from elsewhere: matched by name and shape, after renaming; what did not match is reported.

model:
  weights_from:
    path: ./old_run
    mapping: {"^backbone\\\\.": "model.", "^head\\\\..*": ""}     # an empty name leaves a weight out
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, field_validator

from arctic_like.config.base import Config, wrong
from arctic_like.config.values import RecipePath
from arctic_like.errors import Problem, RecipeError

_SHOWN = 4


class WeightsFromConfig(Config):
    """Weights to begin with, where they are not the model's own."""

    path: RecipePath
    """A `.safetensors` or `.pt` file, a Hugging Face folder, a run directory or a checkpoint in it."""

    mapping: dict[str, str] = Field(default_factory=dict)
    """Regular expression → replacement, applied in this order to each name found there; a name that
    becomes empty is left out."""

    strict: bool = False
    """Refuse unless every weight of the model finds one of its name and shape."""

    @field_validator("mapping")
    @classmethod
    def _patterns(cls, mapping: dict[str, str]) -> dict[str, str]:
        for pattern in mapping:
            try:
                re.compile(pattern)
            except re.error as error:
                raise wrong(f"has {pattern!r}, which is no regular expression: {error}") from None
        return mapping


@dataclass(frozen=True)
class Match:
    """Which weights go where.

    taken: the model's name → the name found. reshaped: names that fit but not in shape. missing: the
    model's that found none. unused: found ones that the model does not have.
    """

    taken: dict[str, str]
    reshaped: list[str]
    missing: list[str]
    unused: list[str]

    def report(self, source: str) -> str:
        """Some lines for the console."""
        total = len(self.taken) + len(self.reshaped) + len(self.missing)
        lines = [f"weights from {source}: {len(self.taken):,} of {total:,} taken"]
        for names, what in (
            (self.reshaped, "have another shape there and stay as they were"),
            (self.missing, "are not there and stay as they were"),
            (self.unused, "are there and not in this model"),
        ):
            if names:
                more = f" … +{len(names) - _SHOWN}" if len(names) > _SHOWN else ""
                lines.append(f"  {len(names):,} {what}: {', '.join(names[:_SHOWN])}{more}")
        return "\n".join(lines)


def match(
    own: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], config: WeightsFromConfig
) -> Match:
    """Match names and shapes. Raises RecipeError where two found weights become one name, nothing
    matches at all, or something is left over under `strict`."""
    renamed: dict[str, str] = {}
    for name in found:
        new = name
        for pattern, replacement in config.mapping.items():
            new = re.sub(pattern, replacement, new)
        if not new:
            continue
        if new in renamed:
            raise RecipeError(
                Problem(f"makes {new!r} of both {renamed[new]!r} and {name!r}",
                        "model.weights_from.mapping")
            )  # fmt: skip
        renamed[new] = name
    same = {new: old for new, old in renamed.items() if new in own}
    taken = {new: old for new, old in same.items() if tuple(own[new]) == tuple(found[old])}
    result = Match(
        taken,
        reshaped=[f"{n} {list(found[same[n]])} → {list(own[n])}" for n in same if n not in taken],
        missing=[name for name in own if name not in same],
        unused=[name for name in renamed if name not in own],
    )
    if not taken:
        raise RecipeError(
            Problem(
                f"is {str(config.path)!r}, and no weight there has name and shape of one of this model: "
                f"there {', '.join(list(renamed)[:_SHOWN])}; here {', '.join(list(own)[:_SHOWN])}",
                "model.weights_from",
                "rename with `mapping`",
            )
        )
    if config.strict and (result.reshaped or result.missing):
        raise RecipeError(
            Problem(f"is strict, but {result.report(str(config.path))}", "model.weights_from",
                    "rename with `mapping`, or set strict: false")
        )  # fmt: skip
    return result
