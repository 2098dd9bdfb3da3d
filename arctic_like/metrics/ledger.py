"""Sums that become the numbers of a line: weighted, kept on the device, read only when asked.

An average carries its weight until the last moment. Nothing here waits for the device except
`Ledger.read`, which is collective: every rank must call it at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.loss import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.engine.host import HostGroup

NEVER = float(2**53)


@dataclass(frozen=True)
class Means:
    """Weighted means over all ranks, and what they were taken over."""

    values: dict[str, float]
    weight: float
    """Total weight of all ranks."""


@dataclass(frozen=True)
class Terms:
    """What one micro-batch adds to a ledger: name → value × weight (float64, on the device)."""

    sums: dict[str, Tensor]
    weight: float
    first_bad: Tensor | None
    """The step if its loss is not finite, else `NEVER`."""


def terms_of(loss: Loss, weight: float, *, step: int = 0) -> Terms:
    """A micro-batch's terms. Several ledgers take them, so that the products are made once.

    With a weight of 0 (a rank with nothing to do) the terms are zeros under the same names, so that
    all ranks reduce the same list.
    """
    import torch

    mean = loss.mean.detach().double()
    if weight == 0:
        zero = torch.zeros_like(mean)
        return Terms(dict.fromkeys(("loss", *loss.values), zero), 0.0, None)
    sums = {"loss": mean * weight}
    for name, value in loss.values.items():
        sums[name] = torch.as_tensor(value, device=mean.device).detach().double() * weight
    return Terms(sums, weight, torch.where(torch.isfinite(mean), NEVER, float(step)))


class Ledger:
    """Accumulates losses of this rank; `read` gives the means over all ranks."""

    def __init__(self, *, device: str, host: HostGroup) -> None:
        self._device = device
        self._host = host
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._first_bad: Tensor | None = None

    def add(self, terms: Terms) -> None:
        """Take in a micro-batch; no synchronisation."""
        for name, value in terms.sums.items():
            self._accumulate(name, value)
        self._weight += terms.weight
        if terms.first_bad is not None:
            have, new = self._first_bad, terms.first_bad
            self._first_bad = new if have is None else new.minimum(have)

    def _accumulate(self, name: str, value: Tensor) -> None:
        have = self._sums.get(name)
        self._sums[name] = value if have is None else have + value

    def read(self, *, reset: bool = True) -> Means:
        """Means over all ranks since the last reset. Waits for the device; collective."""
        names = sorted(self._sums)
        import torch

        local = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        *sums, weight = self._host.sum([*local, self._weight])
        means = {name: total / weight for name, total in zip(names, sums)} if weight else {}
        if reset:
            self.reset()
        return Means(means, weight)

    def reset(self) -> None:
        """Forget the sums (not the first bad step)."""
        self._sums = {}
        self._weight = 0.0

    def first_bad_step(self) -> int | None:
        """The first step on any rank whose loss was not finite, or None. Collective; waits."""
        mine = NEVER if self._first_bad is None else float(self._first_bad)
        step = min(self._host.gather(mine))
        return None if step == NEVER else int(step)

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums, exactly."""
        return {"sums": {k: v.cpu() for k, v in self._sums.items()}, "weight": self._weight}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave; several ranks' states are added up."""
        self.reset()
        for state in states:
            for name, value in state["sums"].items():
                self._accumulate(name, value.to(self._device))
            self._weight += state["weight"]
