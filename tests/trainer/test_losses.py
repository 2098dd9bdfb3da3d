"""Losses of tokens and of sources, against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.loss import Loss
from arctic_like.metrics.ledger import terms_of
from arctic_like.trainer.losses import mean_loss, next_token_loss, source_losses, token_losses

NAMES = ("web", "code", "talks")


def batch(
    seed: int, *, rows: int = 3, length: int = 9, vocabulary: int = 11
) -> dict[str, torch.Tensor]:
    """Random rows whose sources change inside them, as in packs."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int) -> torch.Tensor:
        return torch.randint(high, (rows, length), generator=generator)

    labels = drawn(vocabulary)
    labels[drawn(3) == 0] = -100
    source_ids = drawn(2)  # the third source has no token
    labels[:, -2:], source_ids[:, -2:] = -100, -1  # padding
    logits = torch.randn(rows, length, vocabulary, generator=generator, requires_grad=True)
    return {"logits": logits, "labels": labels, "source_ids": source_ids}


def by_hand(found: dict[str, torch.Tensor], row: int, place: int) -> float:
    """-log p of the token at a place, from the logits before it."""
    logits = [float(x) for x in found["logits"][row, place - 1].detach()]
    target = int(found["labels"][row, place])
    return math.log(sum(math.exp(x) for x in logits)) - logits[target]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_against_loops(seed: int) -> None:
    found = batch(seed)
    labels, source_ids = found["labels"], found["source_ids"]
    losses = token_losses(found["logits"], labels)
    assert losses.shape == (3, 8)
    sums, counts = dict.fromkeys(range(3), 0.0), dict.fromkeys(range(3), 0)
    for row in range(3):
        for place in range(1, 9):
            if labels[row, place] == -100:
                assert losses[row, place - 1] == 0
                continue
            expected = by_hand(found, row, place)
            assert float(losses[row, place - 1].detach()) == pytest.approx(expected, rel=1e-5)
            sums[int(source_ids[row, place])] += expected
            counts[int(source_ids[row, place])] += 1
    groups = source_losses(losses, labels, source_ids, NAMES)
    assert list(groups) == list(NAMES)
    for number, (total, count) in enumerate(groups.values()):
        assert float(count) == counts[number]
        assert float(total) == pytest.approx(sums[number], rel=1e-5)
        assert not total.requires_grad
    tokens = sum(counts.values())
    mean = mean_loss(losses, labels)
    assert float(mean.detach()) == pytest.approx(sum(sums.values()) / max(tokens, 1), rel=1e-5)
    assert torch.equal(mean, next_token_loss(found["logits"], labels))


def test_nothing_trained_is_no_nan() -> None:
    found = batch(0)
    found["labels"].fill_(-100)
    loss = next_token_loss(found["logits"], found["labels"])
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(found["logits"].grad.abs().max()) == 0  # type: ignore[union-attr]


def test_a_rank_with_nothing_to_do_has_the_same_names() -> None:
    found = batch(1)
    losses = token_losses(found["logits"], found["labels"])
    groups = source_losses(losses, found["labels"], found["source_ids"], NAMES)
    loss = Loss(mean_loss(losses, found["labels"]), groups=groups)
    busy, idle = terms_of(loss, 5.0), terms_of(loss, 0.0)
    assert list(busy.groups) == list(idle.groups) == list(NAMES)
    assert all(float(part) == 0 for pair in idle.groups.values() for part in pair)
