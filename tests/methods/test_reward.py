"""Losses of reward models: TRL, enumeration and torch's own cross-entropies in float64."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.methods.reward import (
    bradley_terry,
    pairwise,
    plackett_luce,
    step_classes,
    step_scores,
)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [None, 0.01])
def test_bradley_terry_is_that_of_trl(trl: Any, with_margin: bool, center: float | None) -> None:
    from tests.methods.trl_stubs import reward_loss

    @settings(max_examples=8)
    @given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 5.0, 1e4]))
    def check(seed: int, scale: float) -> None:
        rewards = drawn(2, 5, seed=seed, scale=scale).requires_grad_()
        margin = drawn(5, seed=seed + 1).abs() if with_margin else None
        ours = bradley_terry(rewards[0], rewards[1], margin=margin, center=center or 0.0).mean()
        theirs = reward_loss(trl, rewards[0], rewards[1], margin, center)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)
        left, right = (torch.autograd.grad(one, rewards)[0] for one in (ours, theirs))
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-14)

    check()


def test_rankings_are_a_distribution() -> None:
    rewards = drawn(1, 4, seed=3)
    probabilities = [
        math.exp(-plackett_luce(rewards[:, list(order)]).item()) for order in permutations(range(4))
    ]
    assert sum(probabilities) == pytest.approx(1, rel=1e-12)
    first, *rest = rewards[0].exp().tolist()
    expected = first / (first + sum(rest)) * rest[0] / sum(rest) * rest[1] / sum(rest[1:])
    assert probabilities[0] == pytest.approx(expected, rel=1e-12)


def test_a_ranking_of_two_is_bradley_terry_and_of_one_nothing() -> None:
    rewards = drawn(6, 2, seed=1)
    torch.testing.assert_close(
        plackett_luce(rewards), bradley_terry(rewards[:, 0], rewards[:, 1]), rtol=1e-12, atol=0
    )
    assert plackett_luce(rewards[:, :1]).tolist() == [0] * 6


def test_what_is_not_present_does_not_count() -> None:
    rewards = drawn(3, 5, seed=2)
    present = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]]).bool()
    rewards[~present] = torch.nan
    rewards.requires_grad_()
    found = plackett_luce(rewards, present=present)
    for row in range(2):
        alone = plackett_luce(rewards[row, present[row]][None])
        torch.testing.assert_close(found[row], alone[0], rtol=1e-12, atol=0)
    assert found[2].item() == 0
    slopes = torch.autograd.grad(found.sum(), rewards)[0]
    assert torch.isfinite(slopes).all()
    assert slopes[~present].abs().max().item() == 0


def test_gradients_are_those_of_finite_differences_and_extremes_are_finite() -> None:
    rewards = drawn(2, 4, seed=5).requires_grad_()
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]).bool()
    assert torch.autograd.gradcheck(lambda x: plackett_luce(x, present=present), rewards)
    for dtype in (torch.float32, torch.float64):
        extreme = torch.tensor([[-1e4, 1e4, 0.0, -1e4]], dtype=dtype, requires_grad=True)
        losses = plackett_luce(extreme)
        assert torch.isfinite(losses).all()
        assert torch.isfinite(torch.autograd.grad(losses.sum(), extreme)[0]).all()


def test_steps_against_torch() -> None:
    labels = torch.tensor([[-100, 1, -100, 0], [0, -100, -100, -100]])
    logits = drawn(2, 4, 3, seed=4)
    found = step_classes(logits, labels)
    ended = labels != -100
    assert found.shape == (2, 4)
    assert found[~ended].abs().max().item() == 0
    expected = -torch.log_softmax(logits[ended], -1).gather(1, labels[ended][:, None])[:, 0]
    torch.testing.assert_close(found[ended], expected, rtol=1e-12, atol=0)
    soft = torch.tensor([[-100.0, 0.25, -100.0, 1.0], [0.0, -100.0, -100.0, -100.0]]).double()
    scores = drawn(2, 4, seed=6)
    binary = step_scores(scores, soft)
    assert binary[~ended].abs().max().item() == 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        scores[ended], soft[ended], reduction="none"
    )
    torch.testing.assert_close(binary[ended], expected, rtol=1e-12, atol=1e-14)


def test_two_classes_are_the_binary_loss_of_their_difference() -> None:
    labels = torch.tensor([[1, -100, 0, 1]])
    logits = drawn(1, 4, 2, seed=8)
    torch.testing.assert_close(
        step_classes(logits, labels),
        step_scores(logits[..., 1] - logits[..., 0], labels),
        rtol=1e-12, atol=1e-14,
    )  # fmt: skip


def test_low_precision_is_widened() -> None:
    labels = torch.tensor([[1, 0]])
    assert step_classes(torch.randn(1, 2, 2).bfloat16(), labels).dtype == torch.float32
    assert step_scores(torch.randn(1, 2).bfloat16(), labels).dtype == torch.float32


def test_pairs_of_a_ranking_are_all_ordered_ones() -> None:
    """The mean of Bradley and Terry's loss over (K choose 2) pairs, by a loop."""
    torch.manual_seed(3)
    rewards = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expected = [
        sum(-torch.log(torch.sigmoid(row[j] - row[k])) for j in range(5) for k in range(j + 1, 5))
        / 10
        for row in rewards
    ]
    found = pairwise(rewards)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-12)
    one, other = (torch.autograd.grad(loss.sum(), rewards, retain_graph=True)[0]
                  for loss in (found, torch.stack(expected)))  # fmt: skip
    assert torch.allclose(one, other, rtol=1e-10)
