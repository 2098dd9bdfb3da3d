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
    """

    mean: Tensor
    weight: float | None = None
    values: Mapping[str, Tensor | float] = field(default_factory=dict)
