"""The order of samples: a bijection, every sample once an epoch, and the same for any split."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.data.order import (
    BatchPlan,
    GroupedPlan,
    MixedPlan,
    key_of,
    permute,
    split,
)
from arctic_like.errors import RecipeError

seeds = st.integers(0, 2**63)

PINNED_SMALL = [9, 3, 5, 7, 0, 1, 2, 8, 6, 4]
PINNED_LARGE = [451417, 655100, 133617, 864010]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    found = permute(np.arange(size), size=size, key=key)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(size))


@given(size=st.integers(1, 2**40), key=seeds, data=st.data())
def test_any_place_alone_is_the_place_in_a_batch(size, key, data):
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    together = permute(places, size=size, key=key)
    alone = [int(permute([place], size=size, key=key)[0]) for place in places]
    assert together.tolist() == alone
    assert all(0 <= place < size for place in alone)
    assert len(set(alone)) == len(set(places))


def test_permute_refuses_what_is_outside():
    with pytest.raises(IndexError):
        permute([5], size=5, key=1)
    assert permute([], size=5, key=1).shape == (0,)


def test_permute_is_pinned():
    """The order of a run must survive new versions of everything, or no old run could resume."""
    assert permute(range(10), size=10, key=key_of(0, 0)).tolist() == PINNED_SMALL
    assert permute(range(4), size=10**6, key=key_of(7, 3)).tolist() == PINNED_LARGE


def test_permute_looks_random():
    """Displacement and first items over many keys, against what uniform permutations give."""
    size, keys = 1000, 300
    firsts = np.array([permute(range(size), size=size, key=key_of(k))[0] for k in range(keys)])
    # the mean of uniform integers below 1000: 499.5, standard error 16.7
    assert abs(firsts.mean() - 499.5) < 5 * 16.7
    moved = permute(range(size), size=size, key=key_of(1)) - np.arange(size)
    assert abs(np.abs(moved).mean() / size - 1 / 3) < 0.05
    # all orders of three samples turn up
    small = {tuple(permute(range(3), size=3, key=key_of(k)).tolist()) for k in range(200)}
    assert small == set(itertools.permutations(range(3)))


@settings(deadline=None)
@given(
    size=st.integers(1, 200),
    batch=st.integers(1, 60),
    seed=seeds,
    shuffle=st.booleans(),
    epochs=st.integers(1, 3),
)
def test_every_sample_once_an_epoch(size, batch, seed, shuffle, epochs):
    plan = BatchPlan(size, batch, seed, shuffle=shuffle)
    position = 0
    orders = []
    for epoch in range(epochs):
        seen = []
        for number in range(plan.batches_per_epoch):
            step = plan.at(position)
            assert (step.position, step.epoch) == (position, epoch)
            last = number == plan.batches_per_epoch - 1
            assert len(step.samples) == (size - number * batch if last else batch)
            seen += step.samples.tolist()
            position = step.next_position
        assert sorted(seen) == list(range(size))
        orders.append(seen)
    assert position == epochs * plan.samples_per_epoch
    if not shuffle:
        assert orders == [list(range(size))] * epochs
    elif size > 50 and epochs > 1:
        assert orders[0] != orders[1]


@given(size=st.integers(1, 200), batch=st.integers(1, 60), seed=seeds)
def test_drop_last(size, batch, seed):
    if batch > size:
        with pytest.raises(RecipeError, match="drop_last"):
            BatchPlan(size, batch, seed, drop_last=True)
        return
    plan = BatchPlan(size, batch, seed, drop_last=True)
    samples = []
    for number in range(plan.batches_per_epoch):
        samples += plan.at(number * batch).samples.tolist()
    assert len(set(samples)) == len(samples) == size // batch * batch
    assert plan.at(plan.samples_per_epoch).epoch == 1


@given(
    size=st.integers(2, 100),
    first=st.integers(1, 30),
    then=st.integers(1, 30),
    steps=st.integers(0, 12),
    seed=seeds,
)
def test_another_batch_size_goes_on_in_the_same_order(size, first, then, steps, seed):
    one, other = BatchPlan(size, first, seed), BatchPlan(size, then, seed)
    position, seen = 0, []
    for _ in range(steps):
        seen += one.at(position).samples.tolist()
        position = one.at(position).next_position
    while position < 3 * size:
        seen += other.at(position).samples.tolist()
        position = other.at(position).next_position
    plain = BatchPlan(size, size, seed)
    whole = [s for epoch in range(20) for s in plan_epoch(plain, epoch)]
    assert seen == whole[: len(seen)]


def plan_epoch(plan, epoch):
    return plan.at(epoch * plan.samples_per_epoch).samples.tolist()


@given(
    samples=st.lists(st.integers(0, 10**6), max_size=80),
    micro=st.integers(1, 9),
    ranks=st.integers(1, 8),
)
def test_split(samples, micro, ranks):
    parts = [split(samples, micro_batch_size=micro, rank=r, size=ranks) for r in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert all(len(chunk) <= micro for part in parts for chunk in part)
    # read round by round, rank by rank, it is the global batch in its order
    woven = [sample for chunks in zip(*parts, strict=True) for chunk in chunks for sample in chunk]
    assert woven == samples
    if samples:
        assert any(part[-1] for part in parts), "no round is idle on every rank"


def test_plan_far_away_costs_nothing():
    plan = BatchPlan(10**9, 512, 3)
    step = plan.at(10**15)
    assert len(step.samples) == 512
    assert step.epoch == 10**6


def test_nonsense():
    for size, batch in ((0, 1), (1, 0)):
        with pytest.raises(ValueError):
            BatchPlan(size, batch, 0)
    with pytest.raises(IndexError):
        BatchPlan(3, 1, 0).at(-1)
    with pytest.raises(ValueError):
        split([1], micro_batch_size=1, rank=1, size=1)


def plain_permute(position: int, size: int, key: int) -> int:
    """The same network in plain Python integers; the pinned orders come from it."""

    def mixed(v):
        v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) % 2**64
        return v ^ (v >> 31)

    half = max(1, ((size - 1).bit_length() + 1) // 2)
    value = position
    while True:
        left, right = value >> half, value % 2**half
        for number in range(8):
            left, right = right, left ^ (mixed(right ^ key_of(key, number)) % 2**half)
        value = (left << half) + right
        if value < size:
            return value


@given(size=st.integers(1, 2**45), key=seeds, data=st.data())
def test_against_plain_integers(size, key, data):
    place = data.draw(st.integers(0, size - 1))
    assert permute([place], size=size, key=key).tolist() == [plain_permute(place, size, key)]


sources = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=5
).filter(lambda drawn: any(draws for _, draws in drawn))


@settings(deadline=None)
@given(sources=sources, batch=st.integers(1, 50), seed=seeds, epochs=st.integers(1, 4))
def test_a_mix_draws_its_shares(sources, batch, seed, epochs):
    sizes, draws = zip(*sources, strict=True)
    plan = MixedPlan(sizes, draws, batch, seed)
    borders = np.cumsum((0, *sizes))
    walks = [[] for _ in sizes]
    position = 0
    for epoch in range(epochs):
        drawn = []
        for number in range(plan.batches_per_epoch):
            step = plan.at(position)
            assert (step.position, step.epoch) == (position, epoch)
            last = number == plan.batches_per_epoch - 1
            assert len(step.samples) == (sum(draws) - number * batch if last else batch)
            drawn += step.samples.tolist()
            position = step.next_position
        for source, walk in enumerate(walks):
            mine = [s for s in drawn if borders[source] <= s < borders[source + 1]]
            assert len(mine) == draws[source]
            walk += mine
    assert position == epochs * plan.samples_per_epoch
    for walk, size, count in zip(walks, sizes, draws, strict=True):
        # within an epoch the walk's order is shuffled with the other sources' draws, so what can be
        # counted is how often each sample came: over whole passes equally often, else at most one more
        times = np.bincount(np.array(walk, dtype=int) - min(walk, default=0), minlength=1)
        passes, rest = divmod(epochs * count, size)
        if rest == 0 and passes:
            assert len(set(walk)) == size
            assert set(times.tolist()) == {passes}
        assert max(times, default=0) <= passes + 1


@settings(max_examples=20, deadline=None)
@given(sources=sources, seed=seeds)
def test_a_mix_goes_on_with_another_batch_size(sources, seed):
    sizes, draws = zip(*sources, strict=True)
    one, other = MixedPlan(sizes, draws, 1, seed), MixedPlan(sizes, draws, 7, seed)
    total = 3 * sum(draws)
    alone = [int(one.at(position).samples[0]) for position in range(total)]
    position, together = 0, []
    while position < total:
        together += other.at(position).samples.tolist()
        position = other.at(position).next_position
    assert together == alone


def test_a_walk_over_a_source_is_pass_after_pass():
    """Draw j of epoch e is number e · draws + j of permutations laid end to end."""
    plan = MixedPlan((7, 10), (3, 4), 7, 11)
    for source, size, draws in ((0, 7, 3), (1, 10, 4)):
        first = 0 if source == 0 else 7
        endless = [
            first + place
            for turn in range(4)
            for place in permute(range(size), size=size, key=key_of(11, 1 + source, turn)).tolist()
        ]
        for epoch in range(6):
            drawn = [s for s in plan.at(7 * epoch).samples.tolist() if first <= s < first + size]
            assert sorted(drawn) == sorted(endless[epoch * draws : (epoch + 1) * draws])


def test_a_mix_far_away_costs_nothing():
    plan = MixedPlan((10**9, 5), (10**8, 10**7), 512, 3)
    step = plan.at(11 * 10**15)
    assert len(step.samples) == 512
    assert step.epoch == 10**8
    few = (step.samples >= 10**9).sum()
    assert 20 < few < 80, "a share of 1/11 of 512 is 47"


@settings(deadline=None)
@given(
    size=st.integers(1, 300), batch=st.integers(1, 20), window=st.integers(1, 6), seed=seeds,
    drop_last=st.booleans(), epochs=st.integers(1, 2),
)  # fmt: skip
def test_grouped_batches(size, batch, window, seed, drop_last, epochs):
    if drop_last and batch > size:
        return
    lengths = np.random.default_rng(size).integers(1, 1000, size)
    plain = BatchPlan(size, batch, seed, drop_last=drop_last)
    plan = GroupedPlan(plain, lengths, seed, window)
    for epoch in range(epochs):
        position = epoch * plan.samples_per_epoch
        batches, before = [], []
        for number in range(plan.batches_per_epoch):
            found = plan.at(position)
            assert (found.position, found.epoch) == (position, epoch)
            batches.append(found.samples.tolist())
            before.append(plain.at(position).samples.tolist())
            position = found.next_position
            if number % window == window - 1 or number == plan.batches_per_epoch - 1:
                assert sorted(itertools.chain(*batches)) == sorted(itertools.chain(*before))
        assert [len(b) for b in batches] == [len(b) for b in before]
        # a window's full batches do not overlap in length
        for start in range(0, len(batches), window):
            here = [b for b in batches[start : start + window] if len(b) == batch]
            spans = sorted((int(lengths[b].min()), int(lengths[b].max())) for b in here)
            assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans))


def test_grouped_batches_pad_less():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5000).astype(np.int64) + 1
    plain = BatchPlan(5000, 16, 3)
    plan = GroupedPlan(plain, lengths, 3)

    def padded(one):
        batches = [one.at(n * 16).samples for n in range(one.batches_per_epoch)]
        return sum(len(b) * int(lengths[b].max()) for b in batches)

    assert padded(plan) < 1.15 * lengths.sum()
    assert padded(plain) > 2 * lengths.sum()
    # and long batches do not all come first or last
    means = [float(lengths[plan.at(n * 16).samples].mean()) for n in range(64)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    # another order in every window
    following = [float(lengths[plan.at(n * 16).samples].mean()) for n in range(64, 128)]
    assert np.argsort(means).tolist() != np.argsort(following).tolist()


def test_grouped_batches_begin_at_their_borders():
    plan = GroupedPlan(BatchPlan(10, 4, 0), np.arange(10), 0)
    assert len(plan.at(8).samples) == 2
    assert len(plan.at(10).samples) == 4
    with pytest.raises(IndexError):
        plan.at(3)
