"""Losses and gradients of pairs are TRL's, on the same log-probabilities of tokens, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arctic_like.methods.divergence import reverse_kl, score_of
from arctic_like.methods.logprobs import answer_sums, answer_weights, pair_weights, pairs_of
from arctic_like.methods.pairs import Pairs
from arctic_like.methods.preference import LOSSES, preference_losses
from tests.methods.trl_stubs import dpo_loss

PAIRS, LENGTH = 4, 9


@dataclass
class Case:
    """Tokens of pairs, chosen and rejected in turn: a row has one answer behind a prompt.

    raw: (rows, LENGTH - 1) float64 leaf. labels, mask: (rows, LENGTH). reference: (rows,).
    """

    raw: torch.Tensor
    labels: torch.Tensor
    reference: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return (self.labels != -100).long()

    @property
    def segment_ids(self) -> torch.Tensor:
        return torch.zeros_like(self.labels)

    def pairs(self, **options: Any) -> Pairs:
        policy = answer_sums(
            self.raw, self.labels, self.segment_ids, documents=2 * PAIRS, **options
        )
        reference = type(policy)(self.reference.to(policy.logprobs), policy.tokens)
        return pairs_of(policy, reference)

    def of_trl(self, trl: Any, **options: Any) -> torch.Tensor:
        def stacked(values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values[0::2], values[1::2]])

        if "concentration" in options:
            options["concentration"] = stacked(options["concentration"])
        masked = self.raw * self.mask[:, 1:]
        ref = self.reference
        return dpo_loss(trl, stacked(masked), stacked(self.mask), ref[0::2], ref[1::2], **options)


def case(seed: int, *, scale: float, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(seed)
    raw = -torch.rand(2 * PAIRS, LENGTH - 1, generator=generator, dtype=torch.float64) * 3
    labels = torch.full((2 * PAIRS, LENGTH), -100)
    for row in labels:
        start = int(torch.randint(1, LENGTH - 1, (1,), generator=generator))
        stop = int(torch.randint(start + 1, LENGTH + 1, (1,), generator=generator))
        row[start:stop] = 1
    sums = (raw * (labels[:, 1:] != -100)).sum(1)
    noise = torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)
    return Case(raw.to(dtype).requires_grad_(), labels, (sums + scale * noise).to(dtype))


def agree(
    found: torch.Tensor, expected: torch.Tensor, leaf: torch.Tensor, *, rtol: float = 1e-8
) -> None:
    """The values and the gradients. What TRL computes as 1 - σ(x) has an absolute error of 1e-16."""
    assert torch.isfinite(expected)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13, check_dtype=False)
    ours, theirs = (
        torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in (found, expected)
    )
    assert torch.isfinite(theirs).all()
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-13 if rtol < 1e-7 else 1e-8)


seeds = st.integers(0, 10**6)
scales = st.sampled_from([0.01, 1.0, 30.0, 1e4])
betas = st.sampled_from([0.02, 0.1, 1.0, 5.0])

PLAIN = [name for name in LOSSES if LOSSES[name].reference] + ["sft"]
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


@pytest.mark.parametrize("name", PLAIN)
def test_every_loss_and_gradient(trl: Any, name: str) -> None:
    @settings(max_examples=8)
    @given(seed=seeds, scale=scales, beta=betas, smoothing=st.sampled_from([0.01, 0.125, 0.3]))
    def check(seed: int, scale: float, beta: float, smoothing: float) -> None:
        if name == "discopop":  # TRL's exp(-βΔ) leaves float64 beyond
            assume(beta * scale < 100)
        found = case(seed, scale=scale)
        pairs = found.pairs()
        assert pairs.chosen_tokens is not None
        ours = preference_losses(
            pairs,
            {name: 1.0},
            beta=beta,
            label_smoothing=smoothing if name in SMOOTHED else 0.0,
            delta=0.0,  # TRL 1.16
            mean_tokens=pairs.chosen_tokens.double().mean(),
        )
        theirs = found.of_trl(trl, loss_types=[name], beta=beta, label_smoothing=smoothing)
        agree(ours.losses.mean(), theirs, found.raw)

    check()


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence"])
@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].divergence])
def test_divergences(trl: Any, name: str, divergence: str) -> None:
    @settings(max_examples=4)
    @given(seed=seeds, scale=st.sampled_from([0.1, 3.0]), beta=st.sampled_from([0.1, 0.5]))
    def check(seed: int, scale: float, beta: float) -> None:
        found = case(seed, scale=scale)
        smoothing = 0.1 if name in SMOOTHED else 0.0
        ours = preference_losses(
            found.pairs(), {name: 1.0}, beta=beta, label_smoothing=smoothing,
            score=score_of(divergence),
        )  # fmt: skip
        if name == "discopop":
            assume(bool((ours.losses < 1e100).all()) and scale < 1)
        theirs = found.of_trl(
            trl, loss_types=[name], beta=beta, label_smoothing=0.1, f_divergence_type=divergence
        )
        agree(ours.losses.mean(), theirs, found.raw)

    check()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.5])
def test_alpha_divergence_in_float32_the_only_dtype_that_trl_has_it_in(
    trl: Any, alpha: float
) -> None:
    found = case(3, scale=2.0, dtype=torch.float32)
    pairs = found.pairs()
    score = score_of("alpha_divergence", alpha=alpha)
    ours = preference_losses(pairs, {"sigmoid": 1.0}, beta=0.3, score=score).losses.mean()
    theirs = found.of_trl(
        trl, beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha
    )
    agree(ours, theirs, found.raw, rtol=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "sigmoid_norm"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised_answers(trl: Any, name: str, alpha: float) -> None:
    for seed in range(4):
        found = case(seed, scale=1.0)
        ours = preference_losses(found.pairs(ld_alpha=alpha), {name: 1.0}, beta=0.4)
        theirs = found.of_trl(trl, loss_types=[name], beta=0.4, ld_alpha=alpha)
        agree(ours.losses.mean(), theirs, found.raw)


@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "apo_zero"])
def test_pairs_weighted_by_how_likely_they_are(trl: Any, name: str) -> None:
    for seed in range(4):
        found = case(seed, scale=1.0)
        generator = torch.Generator().manual_seed(seed + 50)
        concentration = -torch.rand(2 * PAIRS, LENGTH - 1, generator=generator).double()
        weights = pair_weights(
            answer_weights(found.raw, concentration, found.labels, found.segment_ids)
        )
        ours = preference_losses(found.pairs(), {name: 1.0}, beta=0.4, weights=weights)
        theirs = found.of_trl(
            trl, loss_types=[name], beta=0.4, use_weighting=True, concentration=concentration
        )
        agree(ours.losses.mean(), theirs, found.raw)


def test_mixtures(trl: Any) -> None:
    found = case(11, scale=2.0)
    pairs = found.pairs()
    assert pairs.chosen_tokens is not None
    mixture = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    ours = preference_losses(
        pairs, mixture, beta=0.1, delta=0.0, mean_tokens=pairs.chosen_tokens.double().mean()
    )
    theirs = found.of_trl(
        trl, loss_types=list(mixture), loss_weights=list(mixture.values()), beta=0.1
    )
    agree(ours.losses.mean(), theirs, found.raw)
    assert list(ours.terms) == list(mixture)
    assert not any(term.requires_grad for term in ours.terms.values())


def test_conservative_dpo_is_the_aot_of_single_pairs(trl: Any) -> None:
    """TRL's `sigmoid` has no label smoothing; its `aot`, which has, is DPO where a batch is one pair."""
    for seed in range(3):
        found = case(seed, scale=3.0)
        ours = preference_losses(found.pairs(), {"sigmoid": 1.0}, beta=0.3, label_smoothing=0.2)
        for pair in range(PAIRS):
            rows = slice(2 * pair, 2 * pair + 2)
            single = Case(found.raw[rows], found.labels[rows], found.reference[rows])
            theirs = single.of_trl(trl, loss_types=["aot"], beta=0.3, label_smoothing=0.2)
            agree(ours.losses[pair], theirs, found.raw)


def test_the_names_are_those_of_trl(trl: Any) -> None:
    """TRL lists them in the sentence that refuses another."""
    found = case(0, scale=1.0)
    with pytest.raises(ValueError) as caught:
        found.of_trl(trl, loss_types=["no such loss"])
    listed = str(caught.value).partition("[")[2].partition("]")[0]
    theirs = {name.strip().strip("'") for name in listed.split(",")}
    assert len(theirs) > 10
    assert theirs == {name for name in LOSSES if LOSSES[name].reference} | {"sft"}


def test_the_reverse_kl_is_the_plain_score() -> None:
    kinds: list[Callable[[torch.Tensor], torch.Tensor]] = [
        reverse_kl, score_of("reverse_kl"), score_of("alpha_divergence", alpha=1.0),
    ]  # fmt: skip
    values = torch.tensor([-3.0, 0.0, 1e4])
    for kind in kinds:
        assert torch.equal(kind(values), values)
