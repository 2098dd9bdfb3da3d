"""Sums that become the numbers of a line: weighted, kept on the device, read only when asked.

An average carries its weight until the last moment. Nothing here waits for the device except
`Ledger.read`, which is collective: every rank must call it at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    weights: dict[str, float] = field(default_factory=dict)
    """Of each group that has one: the weight that its mean was taken over, of all ranks."""


@dataclass(frozen=True)
class Terms:
    """What one micro-batch adds to a ledger: name → value × weight (float64, on the device).

    groups: name → (sum, weight), for what is not a mean over `weight`.
    """

    sums: dict[str, Tensor]
    weight: float
    first_bad: Tensor | None
    """The step if its loss is not finite, else `NEVER`."""
    groups: dict[str, tuple[Tensor, Tensor]]


def terms_of(
    loss: Loss, weight: float, *, step: int = 0, prefix: str = "", stated: bool = True
) -> Terms:
    """A micro-batch's terms. Several ledgers take them, so that the products are made once.

    prefix: stands before every name (`critic/`); such terms carry their weight themselves, as the
    ledger's own is the main learner's. stated: off where there is no loss but other values.
    With a weight of 0 (a rank with nothing to do) the terms are zeros under the same names, so that
    all ranks reduce the same list.
    """
    import torch

    mean = loss.mean.detach().double()
    names = [*(["loss"] if stated else []), *loss.values]
    zero = torch.zeros_like(mean)
    if weight == 0:
        sums = dict.fromkeys(names, zero)
        groups = dict.fromkeys(loss.groups, (zero, zero))
        return _prefixed(Terms(sums, 0.0, None, groups), prefix)

    def number(value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, device=mean.device).detach().double()

    sums = {"loss": mean * weight} if stated else {}
    sums |= {name: number(value) * weight for name, value in loss.values.items()}
    groups = {name: (number(total), number(over)) for name, (total, over) in loss.groups.items()}
    bad = torch.where(torch.isfinite(mean), NEVER, float(step)) if stated else None
    return _prefixed(Terms(sums, weight, bad, groups), prefix)


def _prefixed(terms: Terms, prefix: str) -> Terms:
    if not prefix:
        return terms
    weighted = {
        name: (value, value.new_full((), terms.weight)) for name, value in terms.sums.items()
    }
    groups = {f"{prefix}{name}": pair for name, pair in {**weighted, **terms.groups}.items()}
    return Terms({}, 0.0, terms.first_bad, groups)


class Ledger:
    """Accumulates losses of this rank; `read` gives the means over all ranks."""

    def __init__(self, *, device: str, host: HostGroup) -> None:
        self._device = device
        self._host = host
        self._sums: dict[str, Tensor] = {}
        self._groups: dict[str, tuple[Tensor, Tensor]] = {}
        self._weight = 0.0
        self._first_bad: Tensor | None = None

    def add(self, terms: Terms) -> None:
        """Take in a micro-batch; no synchronisation."""
        for name, value in terms.sums.items():
            self._accumulate(name, value)
        for name, pair in terms.groups.items():
            self._accumulate_group(name, pair)
        self._weight += terms.weight
        if terms.first_bad is not None:
            have, new = self._first_bad, terms.first_bad
            self._first_bad = new if have is None else new.minimum(have)

    def _accumulate(self, name: str, value: Tensor) -> None:
        have = self._sums.get(name)
        self._sums[name] = value if have is None else have + value

    def _accumulate_group(self, name: str, pair: tuple[Tensor, Tensor]) -> None:
        have = self._groups.get(name)
        self._groups[name] = pair if have is None else (have[0] + pair[0], have[1] + pair[1])

    def read(self, *, reset: bool = True) -> Means:
        """Means over all ranks since the last reset. Waits for the device; collective.

        A group without weight in that time has no mean and is left out.
        """
        import torch

        names, groups = sorted(self._sums), sorted(self._groups)
        parts = [self._sums[name] for name in names]
        for name in groups:
            parts += self._groups[name]
        local = torch.stack(parts).tolist() if parts else []
        *sums, weight = self._host.sum([*local, self._weight])
        means = {name: total / weight for name, total in zip(names, sums)} if weight else {}
        rest = sums[len(names) :]
        weights = dict(zip(groups, rest[1::2]))
        means |= {n: total / weights[n] for n, total in zip(groups, rest[::2]) if weights[n]}
        if reset:
            self.reset()
        return Means(means, weight, {name: over for name, over in weights.items() if over})

    def reset(self) -> None:
        """Forget the sums (not the first bad step)."""
        self._sums, self._groups = {}, {}
        self._weight = 0.0

    def first_bad_step(self) -> int | None:
        """The first step on any rank whose loss was not finite, or None. Collective; waits."""
        mine = NEVER if self._first_bad is None else float(self._first_bad)
        step = min(self._host.gather(mine))
        return None if step == NEVER else int(step)

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums, exactly."""
        return {
            "sums": {k: v.cpu() for k, v in self._sums.items()},
            "groups": {k: (s.cpu(), w.cpu()) for k, (s, w) in self._groups.items()},
            "weight": self._weight,
        }

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take back what `state_dict` gave; several ranks' states are added up."""
        self.reset()
        self._first_bad = None  # what is not finite is never saved
        for state in states:
            for name, value in state["sums"].items():
                self._accumulate(name, value.to(self._device))
            for name, (total, over) in state["groups"].items():
                self._accumulate_group(name, (total.to(self._device), over.to(self._device)))
            self._weight += state["weight"]
