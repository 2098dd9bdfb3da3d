"""Batches from any position, by any number of workers, without touching the global generators."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.balance import Division
from arctic_like.data.base import SampleSet
from arctic_like.data.collate import PaddingCollate
from arctic_like.data.loader import Loader, _ahead, evaluation_batches
from arctic_like.data.order import BatchPlan
from arctic_like.errors import RunError


class Numbers(SampleSet):
    """Sample i holds i + 1 copies of i."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken
        self.lengths = np.arange(1, size + 1)
        self.weights = np.arange(size)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("the disk is gone")
        row = np.full(index + 1, index, dtype=np.int64)
        return {"input_ids": row, "labels": row, "position_ids": np.arange(index + 1)}

    def sample_id(self, index):
        return f"numbers:{index + 1}"


COLLATE = PaddingCollate(pad_token_id=99)


def loader(size=7, batch=4, micro=2, rank=0, ranks=1, workers=0, division=None, **more):
    return Loader(
        Numbers(size, **more), COLLATE, BatchPlan(size, batch, 5), division or Division(micro),
        rank=rank, size=ranks, num_workers=workers,
    )  # fmt: skip


def taken(one, position, steps):
    iterator = one.steps(position)
    found = [next(iterator) for _ in range(steps)]
    iterator.close()
    return found


def test_batches_are_the_plans():
    for step in taken(loader(), 0, 5):
        assert step.global_batch.samples.tolist() == [
            sample for micro in step.micro_batches for sample in micro.samples
        ]
        for micro in step.micro_batches:
            assert micro.data["input_ids"][:, 0].tolist() == micro.samples
            assert micro.data["input_ids"].dtype == torch.int64
            assert not micro.idle


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    for position in (0, 8, 11):
        for here, there in zip(
            taken(loader(), position, 4), taken(loader(workers=workers), position, 4), strict=True
        ):
            assert here.global_batch.position == there.global_batch.position
            for one, other in zip(here.micro_batches, there.micro_batches, strict=True):
                assert one.samples == other.samples
                assert all(torch.equal(one.data[key], other.data[key]) for key in one.data)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_share_the_global_batch(ranks):
    for steps in zip(
        *(taken(loader(rank=r, ranks=ranks), 0, 4) for r in range(ranks)), strict=True
    ):
        assert len({len(step.micro_batches) for step in steps}) == 1
        batch = steps[0].global_batch.samples.tolist()
        work = [m for step in steps for m in step.micro_batches if not m.idle]
        assert sorted(s for micro in work for s in micro.samples) == sorted(batch)
        for step in steps:
            for micro in step.micro_batches:
                if micro.idle:
                    assert micro.samples == batch[:1]
                    assert micro.data["input_ids"].shape[0] == 1


def test_goes_on_from_any_position():
    whole = taken(loader(), 0, 6)
    for number, step in enumerate(whole):
        (again,) = taken(loader(), step.global_batch.position, 1)
        assert again.global_batch.samples.tolist() == whole[number].global_batch.samples.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_are_left_alone(workers):
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    taken(loader(workers=workers), 0, 3)
    list(evaluation_batches(Numbers(5), COLLATE, division=Division(2), num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_evaluation_reads_each_sample_once(size, ranks):
    each = [
        list(evaluation_batches(Numbers(size), COLLATE, division=Division(2), rank=r, size=ranks))
        for r in range(ranks)
    ]
    assert len({len(micro) for micro in each}) == 1
    seen = [s for step in zip(*each, strict=True) for m in step if not m.idle for s in m.samples]
    assert seen == list(range(size))


def test_evaluation_of_nothing():
    assert not list(evaluation_batches(Numbers(0), COLLATE, division=Division(2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_sample(workers):
    with pytest.raises(RunError, match=r"sample 3 \(numbers:4\).*the disk is gone"):
        taken(loader(workers=workers, broken={3}), 0, 4)


class Deadly(Numbers):
    """Its worker is ended by the system at sample 3."""

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_the_system_ends_is_named():
    one = Loader(Deadly(6), COLLATE, BatchPlan(6, 6, 1), Division(6), num_workers=1)
    with pytest.raises(RunError, match=r"(?s)worker .* is gone.*dl_num_workers"):
        taken(one, 0, 1)


def test_an_error_has_no_traceback_in_it():
    with pytest.raises(RunError) as found:
        taken(loader(workers=1, broken={3}), 0, 4)
    assert "Traceback" not in str(found.value)


def test_balanced_batches_are_the_same_samples():
    division = Division(2, balance=True)
    for ranks in (1, 3):
        for steps in zip(
            *(taken(loader(rank=r, ranks=ranks, division=division), 0, 4) for r in range(ranks)),
            strict=True,
        ):
            batch = steps[0].global_batch.samples.tolist()
            work = [m for step in steps for m in step.micro_batches if not m.idle]
            assert sorted(s for m in work for s in m.samples) == sorted(batch)
            idle = [m for step in steps for m in step.micro_batches if m.idle]
            # sample i has i + 1 tokens: what stands in costs least
            assert all(m.samples == [min(batch)] for m in idle)


def test_balanced_evaluation_reads_each_sample_once():
    division = Division(2, max_tokens=9, balance=True)
    each = [
        list(evaluation_batches(Numbers(8), COLLATE, division=division, rank=r, size=2))
        for r in range(2)
    ]
    assert len({len(micro) for micro in each}) == 1
    seen = [s for micro in each for m in micro if not m.idle for s in m.samples]
    assert sorted(seen) == list(range(8))
    assert all(m.data["labels"].numel() <= 9 for micro in each for m in micro)


def count(stop, log):
    try:
        for number in range(stop):
            log.append(number)
            yield number
        raise OSError("the end")
    finally:
        log.append("closed")


def test_a_thread_runs_ahead():
    """As where batches are pinned for a device."""
    log = []
    ahead = _ahead(count(5, log), depth=2, prepare=lambda: log.append("prepared"))
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(log) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert log == ["prepared", 0, 1, 2, 3], "one handed out, two ready, one that waits for room"
    assert [next(ahead) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(OSError, match="the end"):
        next(ahead)
    log = []
    ahead = _ahead(count(50, log), depth=2, prepare=lambda: None)
    next(ahead)
    ahead.close()
    assert log[-1] == "closed"
    assert len(log) < 7
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_further_arrays_are_padded_with_minus_one():
    rows = [{**Numbers(4)[n], "source_ids": np.full(n + 1, n)} for n in (1, 3)]
    batch = COLLATE(rows)
    assert batch["source_ids"].tolist() == [[1, 1, -1, -1], [3, 3, 3, 3]]


@given(
    st.lists(st.integers(1, 50), min_size=1), st.integers(1, 16), st.none() | st.integers(1, 50),
    st.booleans(),
)  # fmt: skip
def test_a_batch_is_as_long_as_was_said(lengths, multiple, at_most, fixed):
    collate = PaddingCollate(pad_token_id=0, multiple=multiple, at_most=at_most, fixed=fixed)
    batch = collate([Numbers(50)[length - 1] for length in lengths])
    assert batch["labels"].shape == (len(lengths), collate.padded(np.array(lengths)).max())


def test_padding():
    rows = [Numbers(9)[2], Numbers(9)[4]]
    batch = PaddingCollate(pad_token_id=99, multiple=4, at_most=7)(rows)
    assert batch["input_ids"].tolist() == [[2, 2, 2, 99, 99, 99, 99], [4, 4, 4, 4, 4, 99, 99]]
    assert batch["labels"].tolist() == [[2, 2, 2] + [-100] * 4, [4] * 5 + [-100] * 2]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]]
    assert PaddingCollate(pad_token_id=9, multiple=4)(rows)["labels"].shape == (2, 8)
    assert PaddingCollate(pad_token_id=9, at_most=12, fixed=True)(rows)["labels"].shape == (2, 12)
    assert PaddingCollate(pad_token_id=9)(rows)["labels"].shape == (2, 5)
