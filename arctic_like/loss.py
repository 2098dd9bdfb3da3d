"""A loss that carries its weight until the last moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """What `Trainer.loss` may return in place of a scalar.

    mean: scalar tensor with gradient, the mean over `weight` (trained tokens, pairs, …).
    weight: what the mean was taken over; must equal `Trainer.weight(batch)`. None: not stated.
    values: further numbers to log, name → (mean over `weight`) as float or detached scalar tensor.
    groups: numbers whose mean is over something else, name → (sum, weight of the sum): the loss of one
    source, the accuracy over the rows that have an answer. Logged where the weight is not 0. Every
    micro-batch of every rank must give the same names, with zeros where it has nothing.
    """

    mean: Tensor
    weight: float | None = None
    values: Mapping[str, Tensor | float] = field(default_factory=dict)
    groups: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
