"""Weighted means against exact fractions, over any split into ranks."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.metrics.meter import Meter

numbers = st.floats(-1e6, 1e6, allow_subnormal=False, width=32)
weights = st.integers(0, 5000)
observations = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["loss", "accuracy"]), numbers, weights,
              st.sampled_from(["number", "tensor", "tensor weight"])), min_size=1, max_size=30
)  # fmt: skip


def ranks_sum(meters: list[Meter]):
    """What an all-reduce over these meters does, seen from each of them."""
    collected: list[torch.Tensor] = []
    for meter in meters:
        meter.reduce(lambda sums: collected.append(sums.clone()))
    return lambda sums: sums.copy_(torch.stack(collected).sum(0))


@given(observations)
def test_any_split_gives_the_mean_of_the_whole(seen):
    ranks = [Meter(["loss", "accuracy"], totals=["tokens"]) for _ in range(3)]
    for rank, name, value, weight, kind in seen:
        mean = value if kind == "number" else torch.tensor(value, dtype=torch.float32)
        by = torch.tensor(weight) if kind == "tensor weight" else weight
        ranks[rank].add(name, mean, by)
        ranks[rank].count("tokens", by)
    for rank in ranks:
        got = rank.reduce(ranks_sum(ranks))
        for name in ("loss", "accuracy"):
            of = [(Fraction(v), w) for _, n, v, w, _ in seen if n == name]
            total = sum(w for _, w in of)
            if total:
                exact = float(sum(v * w for v, w in of) / total)
                assert got[name] == pytest.approx(exact, rel=1e-12, abs=1e-6)
            else:
                assert math.isnan(got[name])
        assert got["tokens"] == sum(w for *_, w, _ in seen)


def test_no_mean_of_means():
    meter = Meter()
    meter.add("loss", 1.0, 1)
    meter.add("loss", torch.tensor(4.0), 99)
    assert meter.reduce()["loss"] == pytest.approx(3.97, rel=1e-15)


@pytest.mark.parametrize("weight", [0, torch.tensor(0)])
def test_an_empty_batch_counts_as_nothing(weight):
    meter = Meter()
    meter.add("loss", torch.tensor(math.nan), weight)
    meter.add("loss", 2.0, 3)
    assert meter.reduce() == {"loss": 2.0}


def test_a_real_nan_is_not_hidden():
    meter = Meter()
    meter.add("loss", torch.tensor(math.nan), 4)
    meter.add("loss", 2.0, 3)
    assert math.isnan(meter.reduce()["loss"])


def test_bfloat16_values_add_up_in_float64():
    meter = Meter()
    for _ in range(1000):
        meter.add("loss", torch.tensor(1.0078125, dtype=torch.bfloat16), 1)
    assert meter.reduce()["loss"] == 1.0078125


def test_no_graph_is_kept():
    meter = Meter()
    loss = (torch.ones(1, requires_grad=True) * 2).sum()
    meter.add("loss", loss, 2)
    assert all(not part.requires_grad for part in meter._means["loss"] if torch.is_tensor(part))


def test_reset_keeps_the_names():
    meter = Meter()
    meter.update({"a": 1.0, "b": torch.tensor(2.0)}, 3)
    meter.count("tokens", 7)
    meter.reset()
    got = meter.reduce()
    assert math.isnan(got["a"])
    assert math.isnan(got["b"])
    assert got["tokens"] == 0
