"""Losses of pairs against closed forms, limits and symmetries in float64; the table."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.errors import RecipeError, RunError
from arctic_like.methods import paired
from arctic_like.methods.divergence import DIVERGENCES, score_of
from arctic_like.methods.pairs import Pairs
from arctic_like.methods.preference import (
    LOSSES,
    implicit_rewards,
    mixture_problems,
    preference_losses,
)
from tests.methods.parts import derivatives, pairs_with, passes_gradcheck, random_pairs

COMPARING = [name for name in LOSSES if LOSSES[name].reference]
NUMBERS = {"beta": 0.3, "label_smoothing": 0.1, "gamma": 0.5, "shape": 0.2}


def numbers(name: str, **others: Any) -> dict[str, Any]:
    known = NUMBERS | others
    return {key: value for key, value in known.items() if key in LOSSES[name].numbers}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log σ(x)."""
    return math.log1p(math.exp(-x))


# r_chosen = 2, r_rejected = -1, answers of 4 tokens, β = 0.3: βΔ = 0.9
CLOSED = {
    "sigmoid": 0.9 * nls(0.9) + 0.1 * nls(-0.9),
    "hinge": 0.1,
    "ipo": (0.75 - 1 / 0.6) ** 2,
    "sigmoid_norm": 0.9 * nls(0.225) + 0.1 * nls(-0.225),
    "exo_pair": sigma(0.9) * math.log(sigma(0.9) / 0.9) + sigma(-0.9) * math.log(sigma(-0.9) / 0.1),
    "robust": (0.9 * nls(0.9) - 0.1 * nls(-0.9)) / 0.8,
    "nca_pair": nls(0.6) + 0.5 * nls(-0.6) + 0.5 * nls(0.3),
    # the mean reward is (0.6 - 0.3) / 2
    "bco_pair": nls(0.6 - 0.15) + nls(0.3 + 0.15),
    "sppo_hard": (2 - 0.5 / 0.3) ** 2 + (-1 + 0.5 / 0.3) ** 2,
    "apo_zero": sigma(-0.6) + sigma(-0.3),
    "apo_down": sigma(0.6) + sigma(-0.9),
    "discopop": sigma(-18.0) * nls(0.9) + sigma(18.0) * math.exp(-0.9),
    "aot": 0.9 * nls(0.9) + 0.1 * nls(-0.9),
    "aot_unpaired": 0.9 * nls(0.9) + 0.1 * nls(-0.9),
}


def test_every_loss_has_a_closed_form() -> None:
    assert set(CLOSED) == set(COMPARING)


@pytest.mark.parametrize("name", COMPARING)
def test_one_pair_against_its_closed_form(name: str) -> None:
    found = LOSSES[name].function(pairs_with([2.0], [-1.0]), **numbers(name))
    assert found.shape == (1,)
    assert found.item() == pytest.approx(CLOSED[name], rel=1e-12)


@pytest.mark.parametrize("name", COMPARING)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    # delta is not differentiated: it is held still, as the mean that it is by default would not be
    taken = numbers(name, delta=0.2)
    for seed in range(2):
        assert passes_gradcheck(
            lambda pairs: LOSSES[name].function(pairs, **taken), random_pairs(seed)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        (name, divergence)
        for name in COMPARING
        for divergence in DIVERGENCES
        if divergence == "reverse_kl" or LOSSES[name].divergence
    ],
)
def test_extreme_log_ratios_stay_finite(name: str, divergence: str, dtype: torch.dtype) -> None:
    values = [-1e4, -300.0, -40.0, -1e-6, 0.0, 1e-6, 40.0, 300.0, 1e4]
    chosen, rejected = (list(one) for one in zip(*((a, b) for a in values for b in values)))
    for beta in (0.01, 1.0, 10.0):
        for alpha in (0.5, 1.004, 2.0):
            pairs = pairs_with(chosen, rejected, dtype=dtype)
            taken = numbers(name, beta=beta, score=score_of(divergence, alpha=alpha))
            losses = LOSSES[name].function(pairs, **taken)
            assert losses.dtype == dtype
            assert torch.isfinite(losses).all()
            assert all(torch.isfinite(one).all() for one in derivatives(losses, pairs))


@settings(max_examples=20)
@given(
    ratio=st.floats(-20, 20),
    alpha=st.sampled_from([-1.0, 0.0, 0.5, 0.9, 1.0, 1.5, 2.0]),
)
def test_scores_are_the_derivatives_of_their_divergences(ratio: float, alpha: float) -> None:
    """f'(u) by autograd from the generator f, up to the constant that a difference cancels."""
    u = torch.tensor([math.exp(ratio), 1.0], dtype=torch.float64, requires_grad=True)
    generators = {
        "reverse_kl": u * u.log(),
        "forward_kl": -u.log(),
        "js_divergence": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    }
    if abs(alpha) > 1e-9 and alpha != 1:
        generators["alpha_divergence"] = u**alpha / (alpha * (alpha - 1))
    for name, generator in generators.items():
        slopes = torch.autograd.grad(generator.sum(), u)[0]
        scores = score_of(name, alpha=alpha)(u.detach().log())
        expected = slopes[0] - slopes[1]
        torch.testing.assert_close(scores[0] - scores[1], expected, rtol=1e-8, atol=1e-9)


def test_the_alpha_divergence_ends_in_the_two_kls() -> None:
    ratios = torch.linspace(-3, 3, 7, dtype=torch.float64)
    near = score_of("alpha_divergence", alpha=1 - 1e-5)(ratios)
    torch.testing.assert_close(near, ratios, rtol=0, atol=1e-4)
    at_zero = score_of("alpha_divergence", alpha=0.0)(ratios)
    torch.testing.assert_close(at_zero, 1 - torch.exp(-ratios), rtol=1e-12, atol=1e-12)


def test_without_a_difference_no_answer_is_preferred() -> None:
    pairs = pairs_with([0.0], [0.0])
    assert paired.sigmoid(pairs, beta=0.3).item() == pytest.approx(math.log(2), rel=1e-12)
    for name in ("sigmoid", "robust", "sigmoid_norm", "hinge", "exo_pair", "ipo"):
        losses = LOSSES[name].function(pairs, **numbers(name, label_smoothing=0.01))
        chosen, rejected = derivatives(losses, pairs)
        assert chosen.item() == pytest.approx(-rejected.item(), rel=1e-12)
        assert chosen.item() < 0


def test_robust_is_unbiased_under_swapped_labels() -> None:
    """Chowdhury et al.: its mean over labels swapped with probability ε is DPO on the true ones."""
    pairs = random_pairs(4)
    swapped = Pairs(pairs.rejected, pairs.chosen, pairs.ref_rejected, pairs.ref_chosen)
    right, wrong = (paired.robust(one, beta=0.3, label_smoothing=0.2) for one in (pairs, swapped))
    torch.testing.assert_close(
        0.8 * right + 0.2 * wrong, paired.sigmoid(pairs, beta=0.3), rtol=1e-12, atol=1e-12
    )


def test_exo_is_zero_exactly_where_the_policy_has_the_labels_odds() -> None:
    difference = math.log(0.9 / 0.1) / 0.3
    for shift, zero in ((0.0, True), (1.0, False), (-1.0, False)):
        pairs = pairs_with([difference + shift], [0.0])
        loss = paired.exo_pair(pairs, beta=0.3, label_smoothing=0.1).item()
        assert (abs(loss) < 1e-12) is zero
        assert loss > -1e-12


def test_the_likelihood_counts_answers_or_tokens() -> None:
    pairs = Pairs(
        torch.tensor([-6.0, -10.0]), torch.zeros(2),
        chosen_tokens=torch.tensor([2, 10]), rejected_tokens=torch.ones(2),
    )  # fmt: skip
    assert paired.sft(pairs).tolist() == [3.0, 1.0]
    per_token = paired.sft(pairs, mean_tokens=6.0)
    assert per_token.mean().item() == pytest.approx(16 / 12)


def test_rewards_are_what_the_losses_compare() -> None:
    pairs = random_pairs(1)
    ratios = pairs.ratios()
    found = implicit_rewards(pairs, ["ipo"], beta=0.5)
    assert all(torch.equal(one, 0.5 * ratio) for one, ratio in zip(found, ratios, strict=True))
    free = replace(pairs, ref_chosen=None, ref_rejected=None)
    assert torch.equal(implicit_rewards(free, ["cpo"], beta=2.0)[0], 2 * pairs.chosen)
    assert torch.equal(implicit_rewards(free, ["simpo"], beta=2.0)[1], 2 * pairs.means()[1])
    assert not any(one.requires_grad for one in found)


def test_a_mixture_is_its_weighted_terms() -> None:
    pairs = random_pairs(2)
    weights = torch.rand(5, dtype=torch.float64)
    found = preference_losses(pairs, {"sigmoid": 0.5, "sft": 2.0}, beta=0.3, weights=weights)
    expected = 0.5 * paired.sigmoid(pairs, beta=0.3) + 2 * paired.sft(pairs)
    torch.testing.assert_close(found.losses, weights * expected)
    torch.testing.assert_close(found.terms["sft"], weights * paired.sft(pairs))


def test_what_does_not_go_together_is_refused() -> None:
    pairs = random_pairs(0)
    assert mixture_problems(["sigmoid", "sft"], label_smoothing=0.0) == []
    cases: list[tuple[dict[str, Any], str]] = [
        ({"names": []}, "names no loss"),
        ({"names": ["sigmiod"]}, "is 'sigmiod', which is no loss"),
        ({"names": ["apo_zero"], "plain_divergence": False}, "does not cancel"),
        ({"names": ["aot"], "weighted": True}, "sorts answers"),
        ({"names": ["exo_pair"], "label_smoothing": 0.0}, "neither certain nor swapped"),
        ({"names": ["robust"], "label_smoothing": 0.5}, "needs 0 ≤ it < 0.5"),
    ]
    for options, message in cases:
        (problem,) = mixture_problems(options.pop("names"), **options)
        assert message in str(problem)
        assert problem.place
        assert problem.hint
    with pytest.raises(RecipeError, match="does not cancel"):
        preference_losses(pairs, {"nca_pair": 1.0}, beta=0.1, score=score_of("forward_kl"))
    with pytest.raises(RecipeError, match="sorts answers"):
        preference_losses(pairs, {"aot": 1.0}, beta=0.1, weights=torch.ones(5))
    with pytest.raises(RecipeError, match="label_smoothing"):
        paired.exo_pair(pairs, beta=0.1, label_smoothing=0.0)
    with pytest.raises(RecipeError, match="discopop_tau"):
        paired.discopop(pairs, beta=0.1, discopop_tau=2.0)
    with pytest.raises(RecipeError, match="is 'kl', which is no divergence"):
        score_of("kl")
    with pytest.raises(TypeError, match="temperature"):
        preference_losses(pairs, {"sigmoid": 1.0}, beta=0.1, temperature=1.0)


def test_what_a_loss_needs_is_what_the_table_says() -> None:
    pairs = random_pairs(0)
    for name, loss in LOSSES.items():
        without = {"ref_chosen": None, "ref_rejected": None}
        bare = {"chosen_tokens": None, "rejected_tokens": None}
        for missing, needed in ((without, loss.reference), (bare, loss.normalised == "mean")):
            taken = numbers(name, nll_weight=0.0)
            if needed:
                with pytest.raises(RunError, match="not given"):
                    loss.function(replace(pairs, **missing), **taken)
            else:
                loss.function(replace(pairs, **missing), **taken)
