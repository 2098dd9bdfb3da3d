"""The longest samples come first in epoch 0; the rest of the order, and later epochs, are as they were."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.endless import SequentialPlan
from arctic_like.data.longest_first import LongestFirst, longest_first
from arctic_like.data.order import BatchPlan, GroupedPlan, MixedPlan

SEED = 11


def walked(plan, epochs: int = 1) -> list[list[int]]:
    """The samples of each global batch of some epochs."""
    found, position = [], 0
    while position < epochs * plan.samples_per_epoch:
        batch = plan.at(position)
        assert batch.position == position
        found.append(batch.samples.tolist())
        position = batch.next_position
    return found


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


@st.composite
def plans(draw):
    """(plan, lengths of its samples): each of the three, any sizes."""
    batch = draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["batches", "dropped", "mixed", "grouped"]))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    if kind == "mixed":
        draws = [draw(st.integers(1, 60)) for _ in sizes]
        plan = MixedPlan(tuple(sizes), tuple(draws), batch, SEED)
    else:
        size = sum(sizes)
        dropped = kind == "dropped" and size >= batch
        plan = BatchPlan(size, batch, SEED, drop_last=dropped)
    values = st.lists(st.integers(1, 6), min_size=plan.size, max_size=plan.size)
    lengths = np.array(draw(values), dtype=np.int64)
    if kind == "grouped":
        plan = GroupedPlan(plan, lengths, SEED, window=draw(st.integers(1, 4)))
    return plan, lengths


@given(made=plans())
def test_the_order_of_an_epoch_is_that_of_its_batches(made):
    plan, _ = made
    epochs = flat(walked(plan, 2))
    assert [*plan.order(0), *plan.order(1)] == epochs


@given(made=plans())
def test_the_first_batch_is_the_longest_and_nothing_else_is_lost(made):
    plan, lengths = made
    weights = lengths // 2
    first = LongestFirst(plan, lengths, weights, plan.global_batch_size)
    before, after = walked(plan, 2), walked(first, 2)
    assert [len(batch) for batch in before] == [len(batch) for batch in after]
    one, epoch = plan.batches_per_epoch, flat(before[: plan.batches_per_epoch])
    assert after[one:] == before[one:]
    assert Counter(flat(after[:one])) == Counter(epoch)
    demands = sorted(((lengths[s], weights[s]) for s in epoch), reverse=True)
    assert [(lengths[s], weights[s]) for s in after[0]] == demands[: len(after[0])]
    # what is neither among the longest nor stood in front keeps its place
    moved = Counter(after[0]) | Counter(before[0])
    for old, new in zip(flat(before[:one]), flat(after[:one]), strict=True):
        assert old == new or (moved[old] and moved[new])


@given(made=plans(), data=st.data())
def test_any_position_alone_is_the_position_in_a_walk(made, data):
    plan, lengths = made
    first = LongestFirst(plan, lengths, lengths, plan.global_batch_size)
    number = data.draw(st.integers(0, plan.batches_per_epoch - 1))
    fresh = LongestFirst(plan, lengths, lengths, plan.global_batch_size)
    position = number * plan.global_batch_size
    assert fresh.at(position).samples.tolist() == walked(first)[number]


@given(size=st.integers(1, 90), batch=st.integers(1, 20), then=st.integers(1, 20), data=st.data())
def test_another_batch_size_goes_on_in_the_same_order(size, batch, then, data):
    """As long as it keeps how many came first."""
    values = data.draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
    lengths = np.array(values, dtype=np.int64)
    one = LongestFirst(BatchPlan(size, batch, SEED), lengths, lengths, batch)
    other = LongestFirst(BatchPlan(size, then, SEED), lengths, lengths, batch)
    assert flat(walked(one, 2)) == flat(walked(other, 2))


def test_nothing_changes_where_all_are_alike():
    plan = BatchPlan(50, 8, SEED)
    alike = np.full(50, 7)
    assert walked(LongestFirst(plan, alike, alike, 8), 2) == walked(plan, 2)


def test_what_cannot_be_looked_through_stays():
    class Stream:
        lengths = weights = None

    plan = BatchPlan(50, 8, SEED)
    assert longest_first(plan, Stream(), count=8) is plan
    known = np.arange(50)

    class Known:
        lengths = weights = known

    endless = SequentialPlan(1 << 40, 80, 8)
    assert longest_first(endless, Known(), count=8) is endless
    assert longest_first(plan, Known(), count=0) is plan
    assert isinstance(longest_first(plan, Known(), count=8), LongestFirst)
