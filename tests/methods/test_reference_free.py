"""ORPO, SimPO, CPO and their kin: TRL's numbers from the same logits, and closed forms."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from arctic_like.methods import reference_free
from arctic_like.methods.logprobs import answer_logprobs, pairs_of
from arctic_like.methods.pairs import Pairs
from arctic_like.methods.preference import LOSSES, preference_losses
from tests.methods.parts import derivatives, pairs_with, passes_gradcheck, random_pairs
from tests.methods.trl_stubs import Wide, logits_loss

FREE = [name for name in LOSSES if not LOSSES[name].reference]
NUMBERS = {"beta": 0.7, "gamma": 0.3, "shape": 0.25, "label_smoothing": 0.1}


@pytest.fixture(scope="module")
def trainers(trl: Any) -> dict[str, Any]:
    """TRL's experimental trainers; their warning that they may go away is not ours to heed."""
    cpo = importlib.import_module("trl.experimental.cpo.cpo_trainer")
    orpo = importlib.import_module("trl.experimental.orpo.orpo_trainer")
    return {"cpo": cpo.CPOTrainer, "orpo": orpo.ORPOTrainer}


def scene(seed: int, *, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (8, 7, 5) of four pairs, chosen and rejected in turn, and labels (8, 7)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(8, 7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (8, 7), generator=generator)
    labels[:, 0] = -100
    for row in labels:
        row[int(torch.randint(2, 8, (1,), generator=generator)) :] = -100
    return logits.requires_grad_(), labels


def pairs_from(logits: torch.Tensor, labels: torch.Tensor) -> Pairs:
    return pairs_of(answer_logprobs(logits, labels, torch.zeros_like(labels)))


CPO = {
    "cpo": {"loss_type": "sigmoid"},
    "cpo_hinge": {"loss_type": "hinge"},
    "cpo_ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo"},
    "alphapo": {"loss_type": "simpo", "alpha": 0.25},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [0.1, 4.0])
@pytest.mark.parametrize("nll_weight", [0.0, 0.6])
@pytest.mark.parametrize("name", list(CPO))
def test_cpo_is_that_of_trl_from_the_logits_on(
    trainers: dict[str, Any], name: str, nll_weight: float, scale: float, seed: int
) -> None:
    logits, labels = scene(seed, scale=scale)
    pairs = pairs_from(logits, labels)
    assert pairs.chosen_tokens is not None
    ours = preference_losses(
        pairs, {name: 1.0}, **NUMBERS, nll_weight=nll_weight,
        mean_tokens=pairs.chosen_tokens.double().mean(),
    ).losses.mean()  # fmt: skip
    known = {"alpha": 0.0, "simpo_gamma": 0.3, "beta": 0.7, "label_smoothing": 0.1}
    theirs = logits_loss(
        trainers["cpo"],
        torch.cat([logits[0::2], logits[1::2]]),
        torch.cat([labels[0::2], labels[1::2]]),
        cpo_alpha=nll_weight,
        **(known | CPO[name]),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=0)
    left, right = (torch.autograd.grad(one, logits)[0] for one in (ours, theirs))
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_orpo_is_that_of_trl_from_the_logits_on(
    trainers: dict[str, Any], seed: int, scale: float
) -> None:
    logits, labels = scene(seed, scale=scale)
    pairs = pairs_from(logits, labels)
    assert pairs.chosen_tokens is not None
    mean_tokens = pairs.chosen_tokens.double().mean()
    ours = preference_losses(pairs, {"orpo": 1.0}, beta=0.4, mean_tokens=mean_tokens)
    theirs = logits_loss(
        trainers["orpo"],
        torch.cat([logits[0::2], logits[1::2]]).as_subclass(Wide),
        torch.cat([labels[0::2], labels[1::2]]),
        beta=0.4,
    ).as_subclass(torch.Tensor)
    assert theirs.dtype == torch.float64
    torch.testing.assert_close(ours.losses.mean(), theirs, rtol=1e-8, atol=0)
    left, right = (torch.autograd.grad(one, logits)[0] for one in (ours.losses.mean(), theirs))
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-13)


def test_closed_forms() -> None:
    pairs = pairs_with([0.0], [0.0])  # -8 over 4 tokens: p = e^-2 each
    odds = math.exp(-2) / (1 - math.exp(-2))
    assert reference_free.odds_ratio(pairs).item() == pytest.approx(math.log(2), rel=1e-12)
    better = pairs_with([4.0], [0.0])  # -1 per token
    ratio = math.exp(-1) / (1 - math.exp(-1)) / odds
    expected = math.log(1 + 1 / ratio)
    assert reference_free.odds_ratio(better).item() == pytest.approx(expected, rel=1e-12)
    simpo = reference_free.simpo(better, beta=2.0, gamma=0.5)
    assert simpo.item() == pytest.approx(math.log1p(math.exp(-(2 * 1 - 0.5))), rel=1e-12)
    shaped = [(1 - math.exp(0.5 * 1)) / 0.5, (1 - math.exp(0.5 * 2)) / 0.5]
    logit = 2 * (shaped[0] - shaped[1]) - 0.5
    alphapo = reference_free.alphapo(better, beta=2.0, gamma=0.5, shape=0.5)
    assert alphapo.item() == pytest.approx(math.log1p(math.exp(-logit)), rel=1e-12)


def test_alphapo_without_shape_is_simpo() -> None:
    pairs = random_pairs(2)
    assert torch.equal(
        reference_free.alphapo(pairs, beta=1.0, gamma=0.2, shape=0.0),
        reference_free.simpo(pairs, beta=1.0, gamma=0.2),
    )


@pytest.mark.parametrize("name", FREE)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss = LOSSES[name]
    taken = {key: value for key, value in NUMBERS.items() if key in loss.numbers}
    assert passes_gradcheck(lambda pairs: loss.function(pairs, **taken), random_pairs(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FREE)
def test_extreme_log_probabilities_stay_finite(name: str, dtype: torch.dtype) -> None:
    values = [0.0, -1e-12, -1e-3, -0.69, -40.0, -1e4, -4e4]
    chosen, rejected = (list(one) for one in zip(*((a, b) for a in values for b in values)))
    shift = [[one + 8 for one in side] for side in (chosen, rejected)]
    pairs = pairs_with(*shift, dtype=dtype)  # the sums, of 4 tokens each
    losses = preference_losses(pairs, {name: 1.0}, **NUMBERS).losses
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(one).all() for one in derivatives(losses, pairs))


def test_a_sure_rejected_answer_still_has_a_gradient() -> None:
    pairs = pairs_with([0.0], [8.0])  # probability 1
    losses = reference_free.odds_ratio(pairs)
    assert float(derivatives(losses, pairs)[1]) > 0.2  # 1 over 4 tokens
