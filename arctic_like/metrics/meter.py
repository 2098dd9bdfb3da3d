"""Weighted means that carry their weight until the last moment.

A mean is kept as (sum of value × weight, sum of weight); the division happens once, after one
reduction over all ranks for all names, so that two ranks give what one would. Tensors are added
where they are, without waiting for the device; numbers are added in Python; both in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

AllReduce = Callable[["Tensor"], Any]
"""Sums a float64 CPU tensor over all ranks, in place."""


class Meter:
    """Collects means and totals by name until `reset`.

    Every rank must know the same names when `reduce` is called; `declare` adds names without a
    value, for a rank that may have nothing to do.
    """

    def __init__(self, names: Iterable[str] = (), *, totals: Iterable[str] = ()) -> None:
        self._means: dict[str, tuple[Any, Any]] = {}
        self._totals: dict[str, Any] = {}
        self.declare(names, totals=totals)

    def declare(self, names: Iterable[str], *, totals: Iterable[str] = ()) -> None:
        """Make names known: of means, with weight 0, and of totals, with 0."""
        for name in names:
            self._means.setdefault(name, (0.0, 0.0))
        for name in totals:
            self._totals.setdefault(name, 0.0)

    def add(self, name: str, mean: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add a mean that was taken over `weight` (trained tokens, samples, …).

        Scalars: floats, or tensors of one element on any device, which must not change afterwards.
        A value of weight 0 counts as nothing, whatever it is (0/0 of an empty batch is NaN).
        """
        total, weights = self._means.get(name, (0.0, 0.0))
        self._means[name] = (total + _product(mean, weight), weights + _wide(weight))

    def update(self, means: Mapping[str, Tensor | float], weight: Tensor | float = 1.0) -> None:
        """Add several means that were taken over the same weight."""
        for name, mean in means.items():
            self.add(name, mean, weight)

    def count(self, name: str, amount: Tensor | float) -> None:
        """Add to a total (tokens, samples), which `reduce` sums over ranks and does not divide."""
        self._totals[name] = self._totals.get(name, 0.0) + _wide(amount)

    def reduce(self, all_reduce: AllReduce | None = None) -> dict[str, float]:
        """Means and totals over all ranks; collective if `all_reduce` is given.

        Reads all devices once (that is where the host waits). A mean without weight is NaN.
        Does not reset.
        """
        import torch

        means, totals = sorted(self._means), sorted(self._totals)
        parts = [part for name in means for part in self._means[name]]
        parts += [self._totals[name] for name in totals]
        sums = torch.tensor(_on_host(parts), dtype=torch.float64)
        if all_reduce is not None:
            all_reduce(sums)
        values = sums.tolist()
        result = {name: _ratio(values[2 * i], values[2 * i + 1]) for i, name in enumerate(means)}
        return result | dict(zip(totals, values[2 * len(means) :], strict=True))

    def reset(self) -> None:
        """Forget the values, keep the names."""
        self._means = dict.fromkeys(self._means, (0.0, 0.0))
        self._totals = dict.fromkeys(self._totals, 0.0)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach")


def _wide(value: Any) -> Any:
    """The value in float64, detached from any graph, where it is."""
    return value.detach().double().reshape(()) if _is_tensor(value) else float(value)


def _product(mean: Tensor | float, weight: Tensor | float) -> Any:
    """mean × weight in float64, and 0 where the weight is 0."""
    wide, by = _wide(mean), _wide(weight)
    if not _is_tensor(by):
        return wide * by if by else 0.0
    product = wide * by
    return product.where(by != 0, 0.0)


def _on_host(parts: list[Any]) -> list[float]:
    """All numbers on the host: one transfer for each device, not one for each number."""
    import torch

    devices: dict[Any, list[int]] = {}
    for index, part in enumerate(parts):
        if _is_tensor(part):
            devices.setdefault(part.device, []).append(index)
    values = list(parts)
    for indices in devices.values():
        numbers = torch.stack([parts[i] for i in indices]).tolist()
        for index, number in zip(indices, numbers, strict=True):
            values[index] = number
    return cast("list[float]", values)


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else math.nan
