"""Losses that need all pairs of a global batch: what they couple, and how a trainer gets their gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch

from arctic_like.methods import paired
from arctic_like.methods.pairs import Pairs
from arctic_like.methods.preference import LOSSES
from tests.methods.parts import derivatives, random_pairs

COUPLED = [name for name in LOSSES if LOSSES[name].coupled]


def numbers(name: str) -> dict[str, Any]:
    known = {"beta": 0.3, "label_smoothing": 0.1}
    return {key: value for key, value in known.items() if key in LOSSES[name].numbers}


def nls(x: float) -> float:
    """-log σ(x)."""
    return math.log1p(math.exp(-x))


def test_aot_is_the_cheapest_pairing_of_margins() -> None:
    """Optimal transport in one dimension: over all pairings, sorting has the least convex cost."""
    pairs = random_pairs(7, count=4)
    found = paired.aot(pairs, beta=0.5).sum().item()
    ref_chosen, ref_rejected = pairs.references()
    margins = (pairs.chosen - pairs.rejected).tolist()
    reference = (ref_chosen - ref_rejected).tolist()
    costs = [
        sum(nls(0.5 * (a - b)) for a, b in zip(margins, other, strict=True))
        for other in permutations(reference)
    ]
    assert found == pytest.approx(min(costs), rel=1e-12)
    ratios, rejected_ratios = (one.tolist() for one in pairs.ratios())
    costs = [
        sum(nls(0.5 * (a - b)) for a, b in zip(ratios, other, strict=True))
        for other in permutations(rejected_ratios)
    ]
    found = paired.aot_unpaired(pairs, beta=0.5).sum().item()
    assert found == pytest.approx(min(costs), rel=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "aot", "aot_unpaired", "bco_pair", "nca_pair"])
def test_the_order_of_pairs_only_orders_the_losses(name: str) -> None:
    pairs = random_pairs(9, count=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    fields = {key: getattr(pairs, key)[order] for key in vars(pairs)}
    function, taken = LOSSES[name].function, numbers(name)
    torch.testing.assert_close(
        function(Pairs(**fields), **taken), function(pairs, **taken)[order], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_loss_is_another_loss_on_parts_and_the_others_are_not(name: str) -> None:
    pairs = random_pairs(4, count=12)

    def part(where: slice) -> Pairs:
        return Pairs(**{key: getattr(pairs, key)[where] for key in vars(pairs)})

    for loss in (name, "sigmoid", "ipo"):
        function, taken = LOSSES[loss].function, numbers(loss)
        parts = torch.cat([function(part(one), **taken) for one in (slice(0, 5), slice(5, 12))])
        same = torch.allclose(parts, function(pairs, **taken), rtol=1e-9)
        assert same is not LOSSES[loss].coupled


@pytest.mark.parametrize("name", COUPLED)
def test_derivatives_of_the_gathered_batch_train_each_pair_by_itself(name: str) -> None:
    """Two passes: the derivatives by all log-probabilities, then each pair's chain rule by itself."""
    weights = torch.linspace(-1, 1, 6, dtype=torch.float64)
    inputs = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = random_pairs(3, count=6)

    def model(parameter: torch.Tensor) -> Pairs:
        hidden = torch.tanh(inputs * parameter[0]) + inputs * parameter[1]
        return replace(whole, chosen=hidden[:, 0] + whole.chosen.detach(),
                       rejected=hidden[:, 1] + weights + whole.rejected.detach())  # fmt: skip

    parameter = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    function, taken = LOSSES[name].function, numbers(name)
    expected = torch.autograd.grad(function(model(parameter), **taken).mean(), parameter)[0]
    seen = model(parameter.detach())
    gathered = replace(
        seen, chosen=seen.chosen.requires_grad_(), rejected=seen.rejected.requires_grad_()
    )
    slopes = derivatives(function(gathered, **taken) / 6, gathered)
    found = torch.zeros_like(parameter)
    for pair in range(6):
        again = model(parameter)
        value = again.chosen[pair] * slopes[0][pair] + again.rejected[pair] * slopes[1][pair]
        found += torch.autograd.grad(value, parameter)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_reward_shift_and_its_running_mean() -> None:
    pairs = random_pairs(6, count=3)
    rewards = torch.cat([0.3 * one for one in pairs.ratios()])
    shift = paired.reward_shift(pairs, beta=0.3)
    assert not shift.requires_grad
    assert shift.item() == pytest.approx(rewards.mean().item(), rel=1e-12)
    torch.testing.assert_close(
        paired.bco_pair(pairs, beta=0.3, delta=shift), paired.bco_pair(pairs, beta=0.3)
    )
    batches = [torch.randn(n, dtype=torch.float64) for n in (3, 8, 0, 1)]
    running = paired.RunningMean()
    for batch in batches:
        running = running.updated(batch)
    assert running.count == 12
    assert float(running.mean) == pytest.approx(torch.cat(batches).mean().item(), rel=1e-12)
