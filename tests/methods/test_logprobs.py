"""Log-probabilities of answers in packed and padded rows, against loops in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.errors import RunError
from arctic_like.methods.logprobs import (
    Answers,
    answer_logprobs,
    answer_sums,
    answer_weights,
    count_documents,
    document_values,
    log_sum_squares,
    pair_weights,
    pairs_of,
    token_logprobs,
)

VOCABULARY = 7


@dataclass
class Batch:
    """Rows of packed pairs; `documents` has (row, start, stop) of each document in order."""

    logits: torch.Tensor
    labels: torch.Tensor
    segment_ids: torch.Tensor
    documents: list[tuple[int, int, int]]


def batch(seed: int, *, rows: int = 3) -> Batch:
    """A row holds one to three pairs; documents have 2 to 5 tokens, of which the first is not trained,
    nor are others here and there."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    contents = [[number(2, 6) for _ in range(2 * number(1, 4))] for _ in range(rows)]
    length = max(sum(one) for one in contents) + number(0, 3)
    labels = torch.full((rows, length), -100)
    segment_ids = torch.full((rows, length), -1)
    documents = []
    for row, lengths in enumerate(contents):
        start = 0
        for segment, tokens in enumerate(lengths):
            segment_ids[row, start : start + tokens] = segment
            for place in range(start + 1, start + tokens):
                if number(0, 4):
                    labels[row, place] = number(0, VOCABULARY)
            documents.append((row, start, start + tokens))
            start += tokens
    logits = torch.randn(rows, length, VOCABULARY, generator=generator, dtype=torch.float64)
    return Batch(logits.requires_grad_(), labels, segment_ids, documents)


def trained(found: Batch, document: int) -> list[tuple[int, int]]:
    """(row, place) of a document's trained tokens."""
    row, start, stop = found.documents[document]
    return [(row, place) for place in range(start, stop) if found.labels[row, place] != -100]


def by_hand(found: Batch, row: int, place: int) -> float:
    logits = found.logits[row, place - 1].tolist()
    return logits[int(found.labels[row, place])] - math.log(sum(math.exp(x) for x in logits))


seeds = st.integers(0, 10**6)


@settings(max_examples=20)
@given(seed=seeds)
def test_sums_and_counts_are_those_of_a_loop(seed: int) -> None:
    found = batch(seed)
    count = len(found.documents)
    assert count_documents(found.segment_ids) == count
    answers = answer_logprobs(found.logits, found.labels, found.segment_ids)
    assert answers.logprobs.shape == answers.tokens.shape == (count,)
    assert answers.logprobs.dtype == torch.float64
    for document in range(count):
        places = trained(found, document)
        expected = sum(by_hand(found, *place) for place in places)
        assert answers.tokens[document].item() == len(places)
        assert answers.logprobs[document].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    given_count = answer_logprobs(found.logits, found.labels, found.segment_ids, documents=count)
    assert torch.equal(given_count.logprobs, answers.logprobs)


def test_a_document_depends_on_its_own_tokens_alone() -> None:
    found = batch(5)
    answers = answer_logprobs(found.logits, found.labels, found.segment_ids)
    for document, (row, start, stop) in enumerate(found.documents):
        slopes = torch.autograd.grad(answers.logprobs[document], found.logits, retain_graph=True)[0]
        slopes[row, start : stop - 1] = 0  # the last token's logits predict nothing of it
        assert slopes.abs().max().item() == 0


@settings(max_examples=10)
@given(seed=seeds)
def test_packed_answers_are_those_of_rows_of_their_own(seed: int) -> None:
    found = batch(seed)
    packed = answer_logprobs(found.logits, found.labels, found.segment_ids)
    for document, (row, start, stop) in enumerate(found.documents):
        alone = answer_logprobs(
            found.logits[row : row + 1, start:stop],
            found.labels[row : row + 1, start:stop],
            torch.zeros(1, stop - start, dtype=torch.long),
        )
        assert alone.tokens[0] == packed.tokens[document]
        torch.testing.assert_close(
            alone.logprobs[0], packed.logprobs[document], rtol=1e-12, atol=1e-13
        )


def test_gradients_reach_the_logits() -> None:
    found = batch(2, rows=2)
    assert torch.autograd.gradcheck(
        lambda logits: answer_logprobs(logits, found.labels, found.segment_ids).logprobs,
        found.logits,
    )


def test_what_is_not_trained_is_not_looked_at() -> None:
    found = batch(3)
    logprobs = token_logprobs(found.logits, found.labels).detach()
    spoiled = torch.where(found.labels[:, 1:] == -100, torch.nan, logprobs).requires_grad_()
    clean, dirty = (
        answer_sums(one, found.labels, found.segment_ids).logprobs for one in (logprobs, spoiled)
    )
    assert torch.equal(clean, dirty)
    assert torch.isfinite(torch.autograd.grad(dirty.sum(), spoiled)[0]).all()


def test_low_precision_is_widened_and_sums_are_float64() -> None:
    found = batch(4)
    low = found.logits.detach().bfloat16()
    assert token_logprobs(low, found.labels).dtype == torch.float32
    answers = answer_logprobs(low, found.labels, found.segment_ids)
    exact = answer_logprobs(low.double(), found.labels, found.segment_ids)
    torch.testing.assert_close(answers.logprobs, exact.logprobs, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(seed=seeds, alpha=st.sampled_from([0.0, 0.3, 1.0]))
def test_tokens_beyond_the_shorter_answer_count_less(seed: int, alpha: float) -> None:
    found = batch(seed)
    logprobs = token_logprobs(found.logits, found.labels)
    answers = answer_sums(logprobs, found.labels, found.segment_ids, ld_alpha=alpha)
    for document in range(len(found.documents)):
        places, others = trained(found, document), trained(found, document ^ 1)
        expected = sum(
            by_hand(found, *place) * (1.0 if number < len(others) else alpha)
            for number, place in enumerate(places)
        )
        assert answers.logprobs[document].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert answers.tokens[document].item() == len(places)


@settings(max_examples=10)
@given(seed=seeds)
def test_weights_compare_an_answer_with_what_the_model_would_draw(seed: int) -> None:
    found = batch(seed)
    logprobs = token_logprobs(found.logits, found.labels)
    squares = log_sum_squares(found.logits)
    weights = answer_weights(logprobs, squares, found.labels, found.segment_ids)
    assert not weights.requires_grad
    probabilities = found.logits.detach().softmax(-1)
    for document in range(len(found.documents)):
        terms = [
            by_hand(found, row, place)
            - math.log(float(probabilities[row, place - 1].square().sum()))
            for row, place in trained(found, document)
        ]
        expected = math.exp(sum(terms) / len(terms)) if terms else 1.0
        assert weights[document].item() == pytest.approx(expected, rel=1e-10)
    pairs = pair_weights(weights)
    assert pairs[0].item() == pytest.approx((weights[0] * weights[1]).item(), rel=1e-12)


def test_a_uniform_model_finds_every_answer_as_likely_as_its_own() -> None:
    found = batch(6)
    flat = torch.zeros_like(found.logits)
    weights = answer_weights(
        token_logprobs(flat, found.labels), log_sum_squares(flat), found.labels, found.segment_ids
    )
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-12, atol=0)


def test_pairs_are_neighbours() -> None:
    found = batch(7)
    policy = answer_logprobs(found.logits, found.labels, found.segment_ids)
    reference = Answers(policy.logprobs * 2, policy.tokens)
    pairs = pairs_of(policy, reference)
    assert torch.equal(pairs.chosen, policy.logprobs[0::2])
    assert torch.equal(pairs.rejected, policy.logprobs[1::2])
    ref_chosen, ref_rejected = pairs.references()
    assert torch.equal(ref_chosen, policy.logprobs[0::2] * 2)
    assert not ref_rejected.requires_grad
    assert pairs_of(policy).ref_chosen is None
    with pytest.raises(RunError, match="documents, which are not pairs"):
        pairs_of(Answers(policy.logprobs[:3], policy.tokens[:3]))


def test_what_all_tokens_of_a_document_say() -> None:
    segment_ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, -1, -1]])
    desirable = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, -1, -1]])
    assert document_values(desirable, segment_ids).tolist() == [1, 0, 1]


def test_the_batches_of_the_data_path_are_pairs() -> None:
    """The collate's padding (-1, -100) and the numbering of packed pairs, as they arrive."""
    import numpy as np

    from arctic_like.data.collate import PaddingCollate

    def sample(*lengths: int) -> dict[str, np.ndarray]:
        segments = np.repeat(np.arange(len(lengths)), lengths)
        tokens = np.arange(sum(lengths))
        labels = tokens % VOCABULARY
        labels[np.flatnonzero(np.diff(segments, prepend=-1))] = -100
        return {
            "input_ids": tokens, "labels": labels, "position_ids": tokens, "segment_ids": segments,
        }  # fmt: skip

    data = PaddingCollate(pad_token_id=0)([sample(3, 2, 4, 2), sample(2, 5)])
    logits = torch.zeros(*data["labels"].shape, VOCABULARY)
    answers = answer_logprobs(logits, data["labels"], data["segment_ids"])
    assert answers.tokens.tolist() == [2, 1, 3, 1, 1, 4]
    expected = -math.log(VOCABULARY) * answers.tokens
    torch.testing.assert_close(answers.logprobs, expected.double(), rtol=1e-6, atol=0)
