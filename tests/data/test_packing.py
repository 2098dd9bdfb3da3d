"""Packing and cutting: nothing lost, doubled or reordered; best fit as its definition says."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.packing import Pieces, best_fit, cut, end_to_end, grouped, whole


@st.composite
def lengths_and_capacity(draw):
    capacity = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=80))
    return np.array(lengths, dtype=np.int64), capacity


def plain_best_fit(lengths, capacity):
    """The definition, one document at a time: the sizes of the rooms left, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(lengths_and_capacity())
def test_best_fit_is_best_fit_decreasing(given):
    lengths, capacity = given
    pack_of = best_fit(lengths, capacity=capacity)
    used = np.bincount(pack_of, weights=lengths).astype(int) if len(lengths) else np.zeros(0, int)
    assert (used <= capacity).all()
    assert (used > 0).all()
    assert sorted((capacity - used).tolist()) == plain_best_fit(lengths, capacity)


@given(lengths_and_capacity())
def test_packs_hold_every_document_once_in_order(given):
    lengths, capacity = given
    order, offsets = grouped(best_fit(lengths, capacity=capacity))
    assert sorted(order.tolist()) == list(range(len(lengths)))
    for start, end in itertools.pairwise(offsets):
        inside = order[start:end].tolist()
        assert inside == sorted(inside)
        assert lengths[inside].sum() <= capacity


def test_best_fit_refuses_what_cannot_fit():
    for bad in ([5], [0]):
        with pytest.raises(ValueError, match=r"1\.\.4"):
            best_fit(np.array(bad), capacity=4)


def test_a_million_documents_in_seconds():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.0, 1_000_000).astype(np.int64) + 1, 4096)
    started = time.perf_counter()
    pack_of = best_fit(lengths, capacity=4096)
    took = time.perf_counter() - started
    assert lengths.sum() / (4096 * (pack_of.max() + 1)) > 0.999
    assert took < 20, f"{took:.1f} s"


@given(
    lengths=st.lists(st.integers(1, 60), max_size=30).map(lambda xs: np.array(xs, dtype=np.int64)),
    max_length=st.integers(1, 30),
)
def test_cut(lengths, max_length):
    pieces = whole(lengths, np.arange(len(lengths)))
    kept = lengths <= max_length
    dropped = cut(pieces, max_length=max_length, keep="drop")
    assert dropped.document.tolist() == np.flatnonzero(kept).tolist()
    head = cut(pieces, max_length=max_length, keep="start")
    tail = cut(pieces, max_length=max_length, keep="end")
    for one in (head, tail):
        assert one.document.tolist() == list(range(len(lengths)))
        assert one.length.tolist() == np.minimum(lengths, max_length).tolist()
    assert (head.start == 0).all()
    assert (tail.start + tail.length).tolist() == lengths.tolist()
    parts = cut(pieces, max_length=max_length, keep="split")
    assert covered(parts) == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
    assert (parts.length <= max_length).all()
    assert (parts.length > 0).all()


def covered(pieces: Pieces):
    """Every (document, token) of some pieces, in their order."""
    return [
        (int(d), t)
        for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True)
        for t in range(s, s + n)
    ]


@given(lengths_and_capacity())
def test_end_to_end(given):
    lengths, capacity = given
    pieces = whole(lengths, np.arange(len(lengths))[::-1].copy())
    laid, offsets = end_to_end(pieces, capacity=capacity)
    assert covered(laid) == covered(pieces)
    sizes = [int(laid.length[a:b].sum()) for a, b in itertools.pairwise(offsets)]
    assert sizes[:-1] == [capacity] * (len(sizes) - 1)
    assert sum(sizes) == lengths.sum()
    assert all(size <= capacity for size in sizes)
