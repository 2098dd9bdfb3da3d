"""Weighted means: equal to the plain formula, over ranks too, and not finite where a term is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.engine.host import HostGroup
from arctic_like.loss import Loss
from arctic_like.metrics.ledger import Ledger, terms_of
from arctic_like.world import World

LOSSES = st.lists(st.tuples(st.floats(-50, 50, width=32), st.integers(0, 5000)), min_size=1)


def one_rank() -> HostGroup:
    return HostGroup(World())


def loss(mean: float, **values: float) -> Loss:
    import torch

    return Loss(torch.tensor(mean), values=values)


class Together:
    """Adds up what several ledgers on one thread would have sent."""

    def __init__(self, sent: list[list[float]]) -> None:
        self.sent = sent

    def sum(self, values: Any) -> list[float]:
        return [sum(column) for column in zip(values, *self.sent, strict=True)]


@given(LOSSES)
def test_the_mean_is_weighted(pairs: list[tuple[float, int]]) -> None:
    ledger = Ledger(device="cpu", host=one_rank())
    for mean, weight in pairs:
        ledger.add(terms_of(loss(mean, double=2 * mean), weight))
    total = sum(weight for _, weight in pairs)
    means = ledger.read()
    assert means.weight == total
    if total:
        expected = math.fsum(mean * weight for mean, weight in pairs) / total
        assert means.values["loss"] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert means.values["double"] == pytest.approx(2 * expected, rel=1e-6, abs=1e-6)
    assert ledger.read().weight == 0, "a read starts anew"


def test_a_rank_with_nothing_to_do_knows_the_same_names() -> None:
    """Rank 1 has only a stand-in, whose loss is not even finite; rank 0's mean is the mean."""
    idle = Ledger(device="cpu", host=one_rank())
    idle.add(terms_of(loss(math.nan, extra=math.nan), 0.0))
    sent: list[float] = []
    idle._host = Together([])  # type: ignore[assignment]
    idle._host.sum = lambda values: sent.extend(values) or list(values)  # type: ignore[method-assign]
    idle.read()
    busy = Ledger(device="cpu", host=Together([sent]))  # type: ignore[arg-type]
    busy.add(terms_of(loss(3.0, extra=1.0), 7.0))
    means = busy.read()
    assert means.values == {"loss": 3.0, "extra": 1.0}
    assert means.weight == 7.0


def test_the_first_step_that_is_not_finite_is_remembered() -> None:
    ledger = Ledger(device="cpu", host=one_rank())
    for step, value in enumerate([1.0, 2.0, math.inf, 1.0, math.nan], start=1):
        ledger.add(terms_of(loss(value), 1.0, step=step))
    assert not math.isfinite(ledger.read().values["loss"])
    assert ledger.first_bad_step() == 3
    fine = Ledger(device="cpu", host=one_rank())
    fine.add(terms_of(loss(1.0), 1.0, step=1))
    assert fine.first_bad_step() is None


@given(LOSSES, LOSSES)
def test_a_state_goes_on_exactly(
    before: list[tuple[float, int]], after: list[tuple[float, int]]
) -> None:
    straight, cut = (Ledger(device="cpu", host=one_rank()) for _ in range(2))
    for mean, weight in before:
        straight.add(terms_of(loss(mean), weight))
        cut.add(terms_of(loss(mean), weight))
    again = Ledger(device="cpu", host=one_rank())
    again.load_state_dict([cut.state_dict()])
    for ledger in (straight, again):
        for mean, weight in after:
            ledger.add(terms_of(loss(mean), weight))
    assert straight.read() == again.read()
