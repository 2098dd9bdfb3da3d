"""Splits and stretches of them, as recipes name them: `train`, `eval`, `train[:10%]`,
`name:split[:n]`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from arctic_like.data.base import SourceConfig
from arctic_like.errors import Problem, RecipeError

EVALUATION_SPLITS = ("eval", "validation", "valid", "val", "dev", "test")
"""What the split `eval` may be called; the first that there is."""

_SPLIT = re.compile(r"(?P<name>.+):(?P<split>[A-Za-z_][\w.\-]*(?:\[[^\]]*\])?|\[[^\]]*\])")
_SLICE = re.compile(r"(?P<split>[^\[]*)(?:\[(?P<from>-?\d+%?)?:(?P<to>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Stretch:
    """A split and a stretch of it: `train[:10%]`. Bounds are rows, or shares where they end in
    %."""

    split: str
    start: str = ""
    stop: str = ""

    @classmethod
    def parse(cls, text: str) -> Stretch:
        """Raises RecipeError for what is not `split` or `split[from:to]`."""
        match = _SLICE.fullmatch(text)
        if match is None:
            raise RecipeError(
                Problem(
                    f"is {text!r}, not a split", place="split", hint="write train, or train[:1000]"
                )
            )
        return cls(match["split"], match["from"] or "", match["to"] or "")

    @property
    def needs_total(self) -> bool:
        """Whether the rows must be counted before it is known which of them are meant."""
        return any(end.startswith("-") or end.endswith("%") for end in (self.start, self.stop))

    def rows(self, total: int) -> range:
        """The rows of a set of `total` that the stretch names; as Python slices do."""

        def bound(text: str) -> int | None:
            if not text:
                return None
            return round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)

        return range(total)[bound(self.start) : bound(self.stop)]


def names_of(split: str) -> tuple[str, ...]:
    """What a split may be called where the data lies, the likeliest first."""
    return EVALUATION_SPLITS if split == "eval" else (split,)


def stated_part(config: SourceConfig) -> tuple[str, Stretch]:
    """(name or path, part) as the recipe states them: `name:split[:n]` taken apart.

    Raises RecipeError where the name and `split` both state a split.
    """
    name, split = config.name_or_path, config.split
    match = _SPLIT.fullmatch(name) if config.splits_in_name else None
    if match is None or Path(name).exists():
        return name, Stretch.parse(split)
    if split and split != match["split"]:
        raise RecipeError(
            Problem(
                f"is {split!r}, but name_or_path says {match['split']!r}",
                place="split",
                hint="keep one of them",
            )
        )
    return match["name"], Stretch.parse(match["split"])


def named_part(config: SourceConfig) -> tuple[str, Stretch]:
    """`stated_part` with the recipe's names of splits (`split_mapping`) replaced."""
    name, part = stated_part(config)
    mapped = config.split_mapping.get(part.split or "train", part.split)
    return name, Stretch(mapped, part.start, part.stop)
