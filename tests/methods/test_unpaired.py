"""KTO and BCO: TRL's numbers, closed forms, limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.methods import unpaired

seeds = st.integers(0, 10**6)


def scene(seed: int, *, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """Six answers of 5 tokens, of both kinds unless the seed is even and small."""
    generator = torch.Generator().manual_seed(seed)
    tokens = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(6, generator=generator, dtype=torch.float64)
    mismatched = torch.randn(6, generator=generator, dtype=torch.float64)
    return {
        "tokens": tokens.requires_grad_(),
        "ref": tokens.detach().sum(1) + scale * noise,
        "desirable": torch.rand(6, generator=generator) < torch.rand(1, generator=generator),
        "mismatched": mismatched - 10,
        "ref_mismatched": mismatched - 10 - scale * torch.randn(6, generator=generator).double(),
    }


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_losses_and_gradients_are_those_of_trl(trl: Any, loss_type: str) -> None:
    from tests.methods.trl_stubs import kto_loss

    @settings(max_examples=15)
    @given(seed=seeds, scale=st.sampled_from([0.01, 2.0, 1e4]), beta=st.sampled_from([0.05, 1.0]))
    def check(seed: int, scale: float, beta: float) -> None:
        found = scene(seed, scale=scale)
        ratios = found["tokens"].sum(1) - found["ref"]
        options: dict[str, Any] = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
        if loss_type == "kto":
            options["baseline"] = unpaired.kl_baseline(
                found["mismatched"] - found["ref_mismatched"]
            )
        function = getattr(unpaired, loss_type)
        ours = function(ratios, found["desirable"], beta=beta, **options).mean()
        options.pop("baseline", None)
        theirs = kto_loss(
            trl,
            found["tokens"],
            found["ref"],
            found["desirable"],
            mismatched=found["mismatched"],
            ref_mismatched=found["ref_mismatched"],
            loss_type=loss_type,
            beta=beta,
            **options,
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-13)
        left, right = (torch.autograd.grad(one, found["tokens"])[0] for one in (ours, theirs))
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-13)

    check()


def test_the_baseline_is_never_negative_and_has_no_gradient() -> None:
    ratios = torch.tensor([1.0, 2.0, -0.5], requires_grad=True)
    baseline = unpaired.kl_baseline(ratios)
    assert baseline.item() == pytest.approx(2.5 / 3)
    assert not baseline.requires_grad
    assert unpaired.kl_baseline(-ratios).item() == 0


def test_kto_at_the_baseline_is_half_the_weight() -> None:
    found = unpaired.kto(
        torch.tensor([0.7, 0.7]), torch.tensor([1, 0]), beta=3.0, baseline=0.7,
        desirable_weight=2.0, undesirable_weight=0.5,
    )  # fmt: skip
    assert found.tolist() == pytest.approx([1.0, 0.25])


@settings(max_examples=10)
@given(seed=seeds)
def test_bco_is_a_classifier(seed: int) -> None:
    """Binary cross-entropy of the reward minus the shift, by torch."""
    found = scene(seed)
    ratios = (found["tokens"].sum(1) - found["ref"]).detach()
    delta = unpaired.bco_shift(ratios, found["desirable"], beta=0.4)
    weights = torch.rand(6, dtype=torch.float64)
    ours = unpaired.bco(ratios, found["desirable"], beta=0.4, delta=delta, weights=weights)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        0.4 * ratios - delta, found["desirable"].double(), weight=weights, reduction="none"
    )
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)


def test_the_shift_lies_between_the_two_kinds() -> None:
    ratios = torch.tensor([4.0, 2.0, 2.0, -6.0], dtype=torch.float64)
    desirable = torch.tensor([True, True, True, False])
    shift = unpaired.bco_shift(ratios, desirable, beta=0.5).item()
    assert shift == pytest.approx(0.5 * (8 / 3 - 6) / 2, rel=1e-12)
    assert unpaired.bco_shift(ratios, desirable | True, beta=1.0).item() == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_stay_finite(dtype: torch.dtype) -> None:
    values = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
    for desirable in (torch.ones(5), torch.zeros(5)):
        for beta in (0.01, 1.0, 10.0):
            ratios = values.clone().requires_grad_()
            losses = unpaired.kto(ratios, desirable, beta=beta, baseline=3.0)
            losses = losses + unpaired.bco(ratios, desirable, beta=beta, delta=3.0)
            assert losses.dtype == dtype
            assert torch.isfinite(losses).all()
            assert torch.isfinite(torch.autograd.grad(losses.sum(), ratios)[0]).all()


def test_gradients_are_those_of_finite_differences() -> None:
    ratios = torch.linspace(-2, 2, 6, dtype=torch.float64).requires_grad_()
    desirable = torch.tensor([1, 0, 1, 0, 0, 1])
    assert torch.autograd.gradcheck(
        lambda x: unpaired.kto(x, desirable, beta=0.5, baseline=0.3, desirable_weight=1.2), ratios
    )
    assert torch.autograd.gradcheck(
        lambda x: unpaired.bco(x, desirable, beta=0.5, delta=0.3), ratios
    )
    slope = torch.autograd.grad(
        unpaired.kto(ratios, desirable, beta=0.5, baseline=0.0).sum(), ratios
    )[0]
    s = 1 / (1 + math.exp(1.0))  # σ(0.5 · -2)
    assert slope[0].item() == pytest.approx(-0.5 * s * (1 - s), rel=1e-12)
