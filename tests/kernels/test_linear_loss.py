"""Tiled losses against the plain ones: values, all gradients, precision, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from arctic_like.kernels.linear_loss import (
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_log_probs,
)
from tests.kernels.plain import Case, token_losses
from tests.kernels.test_live_bytes import LiveBytes

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"trained": "all"},
    "none": {"trained": "none"},
    "bias": {"bias": True},
    "capped": {"softcap": 1.5},
    "scaled": {"scale": 0.0625, "bias": True},
    "everything": {"softcap": 3.0, "scale": 2.0, "bias": True, "vocabulary": 101},
    "one token": {"tokens": 1, "trained": "all"},
    "adapter": {"rank": 3},
    "adapter and everything": {"rank": 1, "softcap": 3.0, "scale": 2.0, "bias": True},
}
RELATIVE = {torch.float64: 1e-8, torch.float32: 1e-5}


def assert_near(found: Any, expected: Any, relative: float) -> None:
    """By the largest value, as a gradient is used."""
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        size = float(expected.abs().max()) if expected.numel() else 0.0
        assert float((found - expected).abs().max()) <= relative * size


@pytest.mark.parametrize("tile", [1, 4, 1000])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_sum_is_the_plain_one(name: str, dtype: torch.dtype, tile: int) -> None:
    drawn = Case.drawn(**CASES[name])
    ours, plain = drawn.to(dtype), drawn.to(dtype)
    found = linear_cross_entropy_sum(
        ours.hidden, ours.weight, ours.targets, tile=tile, **ours.options
    )
    expected = token_losses(plain)
    assert_near(found.losses, expected.detach(), RELATIVE[dtype])
    assert not found.losses.requires_grad
    (found.total * 0.37).backward()
    (expected.sum() * 0.37).backward()
    assert_near(found.total.detach(), expected.sum().detach(), RELATIVE[dtype])
    for key, gradient in plain.gradients().items():
        assert_near(ours.gradients()[key], gradient, RELATIVE[dtype])


TRAINED = [(name, t) for name in CASES for t in ("all", "hidden", "weight", "head")]
TRAINED += [(name, "low") for name, case in CASES.items() if "rank" in case]


@pytest.mark.parametrize(("name", "trained"), TRAINED)
@pytest.mark.parametrize("tile", [4, 1000])
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_each_token_may_weigh_differently(
    name: str, dtype: torch.dtype, tile: int, trained: str
) -> None:
    drawn = Case.drawn(**CASES[name])
    wanted = {"all": {*drawn.leaves}, "head": {"weight", "bias"}}.get(trained, {trained})
    ours, plain = drawn.to(dtype), drawn.to(dtype)
    for case in (ours, plain):
        for key, leaf in case.leaves.items():
            leaf.requires_grad_(key in wanted)
    found = linear_log_probs(ours.hidden, ours.weight, ours.targets, tile=tile, **ours.options)
    expected = -token_losses(plain)
    assert_near(found.detach(), expected.detach(), RELATIVE[dtype])
    assert float(found.detach()[ours.targets == -100].abs().sum()) == 0
    weights = torch.linspace(-2, 3, len(found), dtype=found.dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for key, gradient in plain.gradients().items():
        assert (gradient is not None) == (key in wanted)
        assert_near(ours.gradients()[key], gradient, RELATIVE[dtype])


@pytest.mark.parametrize("kind", ["sum", "each"])
def test_what_is_frozen_gets_no_gradient(kind: str) -> None:
    ours = Case.drawn(bias=True).to(torch.float32)
    ours.weight.requires_grad_(False)
    if ours.bias is not None:
        ours.bias.requires_grad_(False)
    with LiveBytes() as count:
        loss = _losses(kind, ours, tile=4)
        loss.backward()
    assert ours.hidden.grad is not None
    assert ours.weight.grad is None
    assert count.largest < ours.weight.nbytes


def _losses(kind: str, case: Case, **options: Any) -> torch.Tensor:
    arguments = case.hidden, case.weight, case.targets
    if kind == "sum":
        return linear_cross_entropy_sum(*arguments, **case.options, **options).total
    return linear_cross_entropy(*arguments, **case.options, **options).sum()


@pytest.mark.parametrize("kind", ["sum", "each"])
@pytest.mark.parametrize("name", ["all", "everything"])
def test_bf16_is_at_least_as_near_to_the_truth_as_plain_bf16(name: str, kind: str) -> None:
    worse: dict[str, list[float]] = {}
    for seed in range(8):
        rounded = Case.drawn(**{**CASES[name], "tokens": 61, "width": 32, "seed": seed})
        rounded = rounded.to(torch.bfloat16)
        true, ours, plain = (rounded.to(t) for t in (torch.float64, torch.bfloat16, torch.bfloat16))
        for case, loss in (
            (true, token_losses(true).sum()), (plain, token_losses(plain).sum()),
            (ours, _losses(kind, ours, tile=7)),
        ):  # fmt: skip
            (loss / 43).backward()
            case.scale = loss.item()
        pairs = {"loss": (ours.scale - true.scale, plain.scale - true.scale)}
        for key, gradient in true.gradients().items():
            assert gradient is not None
            errors = [case.gradients()[key].double() - gradient for case in (ours, plain)]  # type: ignore[union-attr]
            pairs[key] = (float(errors[0].norm()), float(errors[1].norm()))
        for key, (mine, theirs) in pairs.items():
            sums = worse.setdefault(key, [0.0, 0.0])
            sums[0], sums[1] = sums[0] + mine**2, sums[1] + theirs**2
    assert worse.keys() >= {"loss", "hidden", "weight"}
    for key, (mine, theirs) in worse.items():
        assert mine <= theirs, key


@pytest.mark.parametrize("kind", ["sum", "each"])
def test_gradients_are_rounded_to_bf16_once_however_many_tiles(kind: str) -> None:
    drawn = Case.drawn(tokens=150, width=32, trained="all", bias=True).to(torch.bfloat16)
    true, ours = drawn.to(torch.float64), drawn.to(torch.bfloat16)
    (token_losses(true).sum() / 43).backward()
    (_losses(kind, ours, tile=1) / 43).backward()
    for key, gradient in true.gradients().items():
        found = ours.gradients()[key]
        assert found is not None
        assert gradient is not None
        # one rounding moves a number by at most 2⁻⁸ of it, a hundred by several times that
        assert float((found.double() - gradient).norm()) < 2**-8 * float(gradient.norm()), key


@pytest.mark.parametrize("kind", ["sum", "each"])
def test_without_gradients_none_are_computed(kind: str) -> None:
    case = Case.drawn(tokens=40, vocabulary=500, trained="all").to(torch.float32)
    with torch.no_grad(), LiveBytes() as count:
        loss = _losses(kind, case, tile=4)
    assert not loss.requires_grad
    assert count.peak < case.weight.nbytes
    assert float(loss) == pytest.approx(float(token_losses(case).detach().sum()), rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["sum", "each"])
def test_inside_a_checkpoint(kind: str, reentrant: bool) -> None:
    ours, plain = (Case.drawn(bias=True).to(torch.float64) for _ in range(2))

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return _losses(kind, Case(hidden, ours.weight, ours.targets, ours.bias), tile=4)

    checkpoint(loss, ours.hidden, use_reentrant=reentrant).backward()
    token_losses(plain).sum().backward()
    for key, gradient in plain.gradients().items():
        assert_near(ours.gradients()[key], gradient, 1e-8)


def test_a_second_backward_is_the_first() -> None:
    case = Case.drawn().to(torch.float64)
    loss = _losses("sum", case, tile=4) * 3
    first = torch.autograd.grad(loss, [case.hidden, case.weight], retain_graph=True)
    second = torch.autograd.grad(loss, [case.hidden, case.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_places_that_are_known_are_those_that_are_found() -> None:
    case = Case.drawn().to(torch.float64)
    places = (case.targets != -100).nonzero().squeeze(1)
    known = linear_cross_entropy(case.hidden, case.weight, case.targets, places=places)
    found = linear_cross_entropy(case.hidden, case.weight, case.targets)
    assert torch.equal(known, found)


def peak(kind: str, *, vocabulary: int, tile: int, frozen: bool, rank: int = 0) -> int:
    """Bytes at once in forward and backward, beside what was there and the gradient that stays."""
    drawn = Case.drawn(tokens=120, width=4, vocabulary=vocabulary, trained="all", rank=rank)
    case = drawn.to(torch.float32)
    case.weight.requires_grad_(not frozen)
    with LiveBytes() as count:
        _losses(kind, case, tile=tile).backward()
    return count.peak


@pytest.mark.parametrize("kind", ["sum", "each"])
def test_peak_memory_is_one_tile_whatever_the_vocabulary(kind: str) -> None:
    # a tile of a fixed number of numbers: the larger the vocabulary, the fewer tokens
    numbers = 24_000
    found = [peak(kind, vocabulary=v, tile=numbers // v, frozen=True) for v in (1000, 4000, 12_000)]
    assert max(found) - min(found) <= 4 * numbers
    assert max(found) < 2 * 4 * numbers
    assert 4 * numbers < 120 * 1000 * 4 / 4  # the whole matrix is four to fifty tiles


@pytest.mark.parametrize("kind", ["sum", "each"])
def test_a_trained_head_adds_its_gradient_and_no_logits(kind: str) -> None:
    numbers = 24_000
    for vocabulary in (1000, 12_000):
        weight = vocabulary * 4 * 4
        found = peak(kind, vocabulary=vocabulary, tile=numbers // vocabulary, frozen=False)
        assert found < 2 * weight + 2 * 4 * numbers


@pytest.mark.parametrize("kind", ["sum", "each"])
def test_an_adapter_of_a_frozen_head_adds_its_gradient_alone(kind: str) -> None:
    numbers = 24_000
    for vocabulary in (1000, 12_000):
        own = vocabulary * 1 * 4
        found = peak(kind, vocabulary=vocabulary, tile=numbers // vocabulary, frozen=True, rank=1)
        assert found < 2 * own + 2 * 4 * numbers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "do not fit"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)}, "bfloat16 and float32"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, r"\(2,\) targets of 3"),
        ({"bias": torch.zeros(4)}, "does not fit"),
        ({"softcap": 0.0}, "not positive"),
        ({"tile": 0}, "at least 1"),
        ({"low": torch.zeros(7, 2)}, r"an adapter's \(7, 2\)"),
        ({"low": torch.zeros(6, 2), "hidden": torch.zeros(3, 6)}, "of 7 logits does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    given = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.long), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**given)
