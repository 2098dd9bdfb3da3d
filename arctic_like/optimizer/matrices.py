"""Which parameters are hidden matrices: what Muon, GaLore and APOLLO are made for.

Their papers leave embeddings, the output layer, norms and biases to AdamW.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from arctic_like.config.base import wrong
from arctic_like.optimizer.base import OptimizerConfig

if TYPE_CHECKING:
    from torch import nn

OUTSIDE = r"embed|wte|wpe|lm_head|classifier|(^|\.)score\."
"""Names of embeddings and output layers in the models of transformers."""


class MatrixConfig(OptimizerConfig):
    """What optimizers have in common that treat hidden matrices in a way of their own."""

    adamw_match: str = Field(default=OUTSIDE)
    """A regular expression, searched for in parameters' names: matrices that AdamW updates although they
    are no embedding of torch, such as output layers."""

    @field_validator("adamw_match")
    @classmethod
    def _is_a_pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise wrong(f"is {match!r}, not a regular expression: {error}") from None
        return match


def hidden_matrices(model: nn.Module, *, adamw_match: str, filters: bool = False) -> set[int]:
    """The ids of the trainable matrices that are neither embeddings nor output layers.

    adamw_match: names of further parameters that are none; empty: no further ones. filters: whether
    those of convolutions count, which have three to five dimensions; an expert's stacked matrices never do.
    """
    from torch import nn

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    outside: set[int] = set()
    inside: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                outside.add(id(parameter))
            elif parameter.ndim == 2 or (filters and isinstance(module, convolutions)):
                inside.add(id(parameter))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside.update(id(parameter) for parameter in head.parameters())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or (adamw_match and re.search(adamw_match, name)):
            outside.add(id(parameter))
    return inside - outside


def split(
    groups: Sequence[dict[str, Any]], matrices: set[int]
) -> list[tuple[dict[str, Any], bool]]:
    """Each of torch's groups as up to two, (group, whether of `matrices`), in their order."""
    found = []
    for group in groups:
        for mine in (True, False):
            parameters = [p for p in group["params"] if (id(p) in matrices) is mine]
            if parameters:
                found.append(({**group, "params": parameters}, mine))
    return found
