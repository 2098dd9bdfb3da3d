"""What recipes of pairs have in common: which losses are mixed, and how."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import InitErrorDetails, ValidationError

from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat, shown, to_float
from arctic_like.errors import Problem
from arctic_like.methods.preference import LOSSES
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.coupled import Coupling


def to_mixture(value: Any) -> dict[str, float]:
    """`sigmoid`, `[sigmoid, sft]` or `{sigmoid: 1, sft: 0.2}` as name → weight."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) < len(value):
            raise wrong("names a loss twice", hint="give its weight instead: {sigmoid: 2.0}")
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, Mapping):
        raise wrong(f"is {shown(value)}, not a loss, a list of losses or a map of their weights")
    for name in value:
        if name not in LOSSES:
            near = difflib.get_close_matches(str(name), LOSSES, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise wrong(
                f"is {shown(name)}, which is no loss", hint=f"{meant}known: {', '.join(LOSSES)}"
            )
    return {str(name): to_float(weight) for name, weight in value.items()}


_NAME = {"enum": [*LOSSES], "type": "string"}
Mixture = Annotated[
    dict[str, float],
    BeforeValidator(to_mixture),
    WithJsonSchema({
        "anyOf": [
            _NAME,
            {"type": "array", "items": _NAME},
            {"type": "object", "propertyNames": _NAME},
        ]
    }),
]  # fmt: skip
"""A loss, a list of losses, or a map of a loss to its weight."""


def raise_problems(title: str, problems: Iterable[Problem]) -> None:
    """Raise them all as one validation error, if there are any."""
    lines = [
        InitErrorDetails(
            type=wrong(problem.message, hint=problem.hint),
            loc=tuple(problem.place.split(".")),
            input=None,
        )
        for problem in problems
    ]
    if lines:
        raise ValidationError.from_exception_data(title, lines)


class PreferenceConfig(TrainerConfig):
    """What recipes of pairs have in common."""

    beta: Annotated[HumanFloat, Field(gt=0)] = 0.1
    """Strength of the preference."""

    coupling: Coupling = "global_batch"
    """Over what a loss that couples pairs (aot, bco_pair, a likelihood per token) does so. `micro_batch`
    is what other programs do; the result then depends on how a batch is divided."""

    likelihood: Literal["token", "answer"] = "token"
    """What the likelihood of chosen answers, where a loss has that term, is the mean over: every token
    alike, or every answer alike."""

    @property
    def mixture(self) -> dict[str, float]:
        """Name of a loss → its weight."""
        raise NotImplementedError

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers that the losses take by name."""
        return {"beta": self.beta}
