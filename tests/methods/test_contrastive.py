"""InfoNCE, Matryoshka and retrieval: closed forms in float64 and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arctic_like.methods.contrastive import (
    ABSENT,
    equal_texts,
    info_nce,
    matryoshka,
    retrieval,
    retrieval_means,
)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(*shape, generator=draw, dtype=torch.float64)
    return found / found.norm(dim=-1, keepdim=True)


def by_hand(anchors: torch.Tensor, candidates: torch.Tensor, scale: float, out: set) -> list[float]:
    """-log of the positive's share, anchor by anchor; `out` has the (anchor, candidate) left out."""
    losses = []
    for i, anchor in enumerate(anchors.tolist()):
        terms = {
            j: math.exp(scale * sum(x * y for x, y in zip(anchor, other, strict=True)))
            for j, other in enumerate(candidates.tolist())
            if (i, j) not in out
        }
        losses.append(-math.log(terms[i] / sum(terms.values())))
    return losses


def test_info_nce_is_its_formula() -> None:
    anchors, candidates = vectors(5, 4), vectors(8, 4, seed=1)
    out = {(0, 3), (2, 7)}
    mask = torch.zeros(5, 8, dtype=torch.bool)
    for place in out:
        mask[place] = True
    found = info_nce(anchors, candidates, inverse_temperature=3.0, left_out=mask)
    assert found.tolist() == pytest.approx(by_hand(anchors, candidates, 3.0, out), rel=1e-12)


def test_the_symmetric_loss_is_the_mean_with_that_of_the_other_direction() -> None:
    anchors, candidates = vectors(5, 4), vectors(7, 4, seed=1)
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 4] = True  # anchor 1 and the positive of anchor 4
    found = info_nce(anchors, candidates, inverse_temperature=2.0, left_out=mask, symmetric=True)
    there = by_hand(anchors, candidates, 2.0, {(1, 4)})
    back = by_hand(candidates[:5], anchors, 2.0, {(4, 1)})
    expected = [(a + b) / 2 for a, b in zip(there, back, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_texts_are_no_negatives() -> None:
    anchors = torch.tensor([10, 11, 10, 12])
    candidates = torch.tensor([0, 1, 2, 0, 2, 7, ABSENT, 1])
    found = {tuple(place) for place in equal_texts(anchors, candidates).nonzero().tolist()}
    absent = {(i, 6) for i in range(4)}
    # anchors 0 and 2 are one text, whose positives are 0 and 2; 3 has the positive 0, 1 the positive 1
    same = {(0, 2), (0, 3), (0, 4), (2, 0), (2, 3), (2, 4), (3, 0), (1, 7)}
    assert found == absent | same


def test_matryoshka_cuts_and_normalises() -> None:
    found = matryoshka(torch.tensor([[3.0, 4.0, 12.0]]), 2)
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_retrieval_in_closed_form() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]])
    relevant = torch.tensor([[False, True, False, True], [False, False, False, True]])
    found = retrieval(scores, relevant)
    ideal = 1 + 1 / math.log2(3)
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    assert found["ndcg@10"].tolist() == pytest.approx([gain / ideal, 1.0])
    assert found["mrr@10"].tolist() == [0.5, 1.0]
    assert found["recall@1"].tolist() == [0.0, 1.0]
    assert found["recall@10"].tolist() == [1.0, 1.0]


def test_ndcg_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    scores, relevant = draw.normal(size=(40, 30)), draw.random((40, 30)) < 0.2
    relevant[np.arange(40), draw.integers(0, 30, 40)] = True
    expected = metrics.ndcg_score(relevant.astype(float), scores, k=10)
    found = retrieval(torch.tensor(scores), torch.tensor(relevant))
    assert float(found["ndcg@10"].mean()) == pytest.approx(expected, rel=1e-12)
    ranked = np.take_along_axis(relevant, np.argsort(-scores, axis=1), axis=1)[:, :10]
    recall = (ranked.sum(1) / relevant.sum(1)).mean()
    assert float(found["recall@10"].mean()) == pytest.approx(recall, rel=1e-12)
    first = np.where(ranked.any(1), 1 / (ranked.argmax(1) + 1), 0).mean()
    assert float(found["mrr@10"].mean()) == pytest.approx(first, rel=1e-12)


def test_retrieval_counts_each_text_once_and_equal_anchors_share_their_positives() -> None:
    anchors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 0.0]])
    anchor_keys, keys = torch.tensor([1, 1, 2]), torch.tensor([5, 6, 5, 7, ABSENT])
    found = retrieval_means(anchors, candidates, anchor_keys, keys, chunk=2)
    # anchors 0 and 1: first 6, then 5, both theirs; anchor 2: first 7, which is not its own, then 5
    assert found["recall@1"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert found["mrr@10"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["ndcg@10"] == pytest.approx((1 + 1 + 1 / math.log2(3)) / 3)
    assert found["recall@10"] == 1.0
