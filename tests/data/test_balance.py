"""Global batches cut by length: nothing lost, bounds kept, and less waiting than without."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.balance import Division

lengths = st.lists(st.integers(1, 500), min_size=1, max_size=60).map(np.array)
ranks = st.integers(1, 8)


def cost(chunk, of):
    """Padded tokens of a micro-batch."""
    return len(chunk) * max((int(of[sample]) for sample in chunk), default=0)


def rounds(shares):
    return list(zip(*shares, strict=True))


def critical(shares, of):
    """Padded tokens that pass if all ranks wait for each other in every round."""
    return sum(max(cost(chunk, of) for chunk in row) for row in rounds(shares))


@given(of=lengths, ranks=ranks, rows=st.integers(1, 9), budget=st.none() | st.integers(1, 3000),
       balance=st.booleans())  # fmt: skip
def test_every_sample_once_within_bounds(of, ranks, rows, budget, balance):
    division = Division(rows, max_tokens=budget, balance=balance)
    shares = division.shares(range(len(of)), of, ranks=ranks)
    assert len({len(share) for share in shares}) == 1
    chunks = [chunk for row in rounds(shares) for chunk in row if chunk]
    assert sorted(s for chunk in chunks for s in chunk) == list(range(len(of)))
    assert all(any(row) for row in rounds(shares)), "no round is idle on every rank"
    if budget is None:
        assert all(len(chunk) <= rows for chunk in chunks)
        assert len(rounds(shares)) == -(-len(of) // (rows * ranks))
    else:
        assert all(len(chunk) == 1 or cost(chunk, of) <= budget for chunk in chunks)


@given(of=lengths, ranks=ranks, rows=st.integers(1, 9))
def test_balance_never_costs(of, ranks, rows):
    """Among chunks of at most `rows` samples: padding and waiting are never more than unsorted."""
    plain = Division(rows).shares(range(len(of)), of, ranks=ranks)
    even = Division(rows, balance=True).shares(range(len(of)), of, ranks=ranks)
    assert critical(even, of) <= critical(plain, of)
    largest = [max(cost(chunk, of) for share in s for chunk in share) for s in (even, plain)]
    assert largest[0] <= largest[1], "the peak of memory"


@given(of=lengths, ranks=ranks, budget=st.integers(1, 3000))
def test_a_budget_needs_no_more_rounds_than_any_order(of, ranks, budget):
    plain = Division(1, max_tokens=budget).shares(range(len(of)), of, ranks=ranks)
    even = Division(1, max_tokens=budget, balance=True).shares(range(len(of)), of, ranks=ranks)
    assert len(even[0]) <= len(plain[0])


@given(of=lengths, ranks=ranks, budget=st.none() | st.integers(1, 3000))
def test_longest_first_and_the_rounds_alike(of, ranks, budget):
    """The first round has the peak of memory, and no chunk fits better into an earlier round."""
    shares = Division(4, max_tokens=budget, balance=True).shares(range(len(of)), of, ranks=ranks)
    work = [[cost(chunk, of) for chunk in row] for row in rounds(shares)]
    assert all(min(before) >= max(after) for before, after in pairwise(work))


def test_ranks_get_about_the_same():
    """Lengths of real conversations vary by a factor of hundred; the work of ranks does not."""
    of = np.random.default_rng(0).lognormal(5, 1, 512).astype(np.int64) + 1
    even = Division(1, max_tokens=4096, balance=True).shares(range(512), of, ranks=4)
    work = [sum(cost(chunk, of) for chunk in share) for share in even]
    assert max(work) / min(work) < 1.03
    assert sum(work) < 1.1 * of.sum(), "padding"
    plain = Division(1, max_tokens=4096).shares(range(512), of, ranks=4)
    assert critical(even, of) < 0.6 * critical(plain, of)


def test_known_cuts():
    of = np.array([100, 1, 1, 1, 1, 1])
    # the long one alone, and the others as even as can be
    shares = Division(4, balance=True).shares(range(6), of, ranks=3)
    assert shares == [[[0]], [[1, 2, 3]], [[4, 5]]]
    shares = Division(4, balance=True).shares(range(6), of, ranks=2)
    assert shares == [[[0, 1]], [[2, 3, 4, 5]]]
    # five alike on two ranks: three and two, not four and one
    shares = Division(4, balance=True).shares(range(5), np.full(5, 7), ranks=2)
    assert shares == [[[0, 1, 2]], [[3, 4]]]
    # a sample above the budget is by itself
    shares = Division(4, max_tokens=10, balance=True).shares(
        range(3), np.array([30, 5, 5]), ranks=1
    )
    assert shares == [[[0], [1, 2]]]
    # nothing is known of lengths: by number
    assert Division(2, balance=True).shares(range(3), None, ranks=2) == [[[0, 1]], [[2]]]
    assert Division(2).shares([], np.array([]), ranks=2) == [[], []]


def test_nonsense():
    with pytest.raises(ValueError):
        Division(0)
    with pytest.raises(ValueError):
        Division(1, max_tokens=0)
