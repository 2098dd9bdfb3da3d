"""Streaming: every row once a pass, the same from any state, blocks that come and go."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.balance import Division
from arctic_like.data.endless import SequentialPlan
from arctic_like.data.factory import CausalDataConfig, CausalDataFactory
from arctic_like.data.loader import Loader
from arctic_like.data.stream import SourceState, StreamState, quotas
from arctic_like.errors import RecipeError, RunError
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World

# Arithmetic ---------------------------------------------------------------------------------------


def after(state, rows, tokens):
    """The state after a block, no source ending."""
    sources = tuple(
        SourceState(rows=s.rows + n, tokens=s.tokens + n * t)
        for s, n, t in zip(state.sources, rows, tokens, strict=True)
    )
    return StreamState(state.block + 1, 0, sources)


@given(
    weights=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    window=st.integers(1, 200),
    blocks=st.integers(1, 20),
)
def test_rows_stand_in_their_shares(weights, window, blocks):
    state = StreamState(0, 0, (SourceState(),) * len(weights))
    for _ in range(blocks):
        rows = quotas(state, window=window, weights=weights)
        assert sum(rows) == window
        assert min(rows) >= 0
        state = after(state, rows, [1] * len(weights))
        total = sum(source.rows for source in state.sources)
        for source, weight in zip(state.sources, weights, strict=True):
            assert abs(source.rows - total * weight / sum(weights)) <= 1 + 1e-6


@given(sources=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=2, max_size=5))
def test_tokens_stand_in_their_shares(sources):
    """Documents of each source are of one length: from the second block on it is known, and what
    the first took too much of is made up for."""
    weights, lengths = zip(*sources, strict=True)
    state = StreamState(0, 0, (SourceState(),) * len(weights))
    for _ in range(100):
        rows = quotas(state, window=200, weights=weights, by_token=True)
        assert sum(rows) == 200
        state = after(state, rows, lengths)
    total = sum(source.tokens for source in state.sources)
    for source, weight in zip(state.sources, weights, strict=True):
        # to about one document of each source
        assert abs(source.tokens - total * weight / sum(weights)) <= 2 * sum(lengths)


@given(ended=st.lists(st.booleans(), min_size=1, max_size=6).filter(lambda e: not all(e)),
       window=st.integers(1, 50), block=st.integers(0, 9))  # fmt: skip
def test_sources_without_weights_give_alike(ended, window, block):
    state = StreamState(block, 0, tuple(SourceState(ended=one) for one in ended))
    rows = quotas(state, window=window)
    assert sum(rows) == window
    live = [n for n, over in zip(rows, ended, strict=True) if not over]
    assert max(live) - min(live) <= 1
    assert not any(n for n, over in zip(rows, ended, strict=True) if over)


# A stream -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def folder(tmp_path):
    """Two sources; row n of the first is the text "a" and n."""
    for letter, count in (("a", 23), ("b", 7)):
        rows = [{"text": f"{letter}{n}" + "." * (n % 5)} for n in range(count)]
        (tmp_path / f"{letter}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def prepared(folder, tokenizer, sources, *, run="run", world=None, **more):
    config = CausalDataConfig.model_validate(
        {
            "sources": sources, "max_length": 32, "cache_dir": folder / "cache", "streaming": True,
            "streaming_window": 10, "pack_samples": False, **more,
        }
    )  # fmt: skip
    return CausalDataFactory(config).build(
        tokenizer=tokenizer,
        output_dir=folder / run,
        seed=3,
        world=world or World(),
        train_iters=100,
    )


def plain(folder, letters="ab", weights=None):
    return [
        {"name_or_path": str(folder / f"{letter}.jsonl"), **({"weight": w} if w else {})}
        for letter, w in zip(letters, weights or [None] * len(letters), strict=True)
    ]


def text(tokenizer, sample):
    return tokenizer.decode(sample["input_ids"], skip_special_tokens=True).rstrip(".")


def texts(tokenizer, samples, start, stop):
    return [text(tokenizer, samples[n]) for n in range(start, stop)]


def test_every_row_once_a_pass(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder))
    found = texts(tokenizer, data.train, 0, 60)
    rows = sorted([f"a{n}" for n in range(23)] + [f"b{n}" for n in range(7)])
    passes = [found[start : start + 30] for start in (0, 30)]
    assert all(sorted(one) == rows for one in passes)
    assert passes[0] != passes[1]
    blocks = [found[0:10], found[10:20]]
    assert all(one != sorted(one) for one in blocks), "shuffled"
    assert sum(one.startswith("b") for one in blocks[0]) == 5, "sources alike, until one ends"


def test_weighted_sources_begin_again_by_themselves(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder, weights=[1, 3]))
    found = texts(tokenizer, data.train, 0, 140)
    mine = {letter: [t for t in found if t.startswith(letter)] for letter in "ab"}
    assert (len(mine["a"]), len(mine["b"])) == (35, 105)
    times = [mine["b"].count(f"b{n}") for n in range(7)]
    assert times == [15] * 7
    assert {mine["a"].count(f"a{n}") for n in range(23)} <= {1, 2}


def test_one_source_goes_round_and_round(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder, "b"))
    assert sorted(texts(tokenizer, data.train, 0, 70)) == sorted(
        f"b{n}" for n in range(7) for _ in range(10)
    )


@pytest.mark.parametrize("pack", [False, True])
def test_the_same_from_any_state(folder, tokenizer, pack):
    """Also with the blocks gone, and the state through JSON."""
    sources = plain(folder, weights=[2, 1])
    more = {"mix_by": "token", "pack_samples": pack}
    whole = prepared(folder, tokenizer, sources, **more).train
    count = 8 if pack else 25
    expected = [whole[n] for n in range(count)]
    states = []
    one = prepared(folder, tokenizer, sources, run="one", **more).train
    for number in range(count):
        one[number]
        states.append(json.dumps(one.state(number)))
    assert max(map(len, states)) < 300, "of constant size, but for the digits"
    for number in (0, 4, count - 1):
        again = prepared(folder, tokenizer, sources, run=f"again-{number}", **more).train
        again.take_up(json.loads(states[number]))
        for later in range(number, count):
            sample = again[later]
            assert all(
                np.array_equal(sample[name], expected[later][name]) for name in expected[later]
            )


def test_ranks_read_the_same_blocks(folder, tokenizer):
    """One process of the machine makes them; another rank only waits and reads."""
    first = prepared(folder, tokenizer, plain(folder))
    second = prepared(folder, tokenizer, plain(folder), world=World(rank=1, size=2, local_rank=1))
    assert second.train._preparer is None
    steps = [
        iter(
            Loader(one.train, one.collate, one.plan(8), Division(2, balance=True), rank, 2).steps()
        )
        for rank, one in enumerate((first, second))
    ]
    seen = []
    for _ in range(6):
        both = [next(one) for one in steps]
        assert len({len(step.micro_batches) for step in both}) == 1
        assert both[0].global_batch.samples.tolist() == both[1].global_batch.samples.tolist()
        seen += [s for step in both for m in step.micro_batches if not m.idle for s in m.samples]
    assert sorted(seen) == list(range(48))


@pytest.mark.parametrize("workers", [0, 2])
def test_through_workers(folder, tokenizer, workers):
    data = prepared(folder, tokenizer, plain(folder), run=f"workers-{workers}")
    loader = Loader(
        data.train, data.collate, data.plan(4), Division(4, max_tokens=24, balance=True),
        num_workers=workers,
    )  # fmt: skip
    steps = loader.steps(8)
    found = []
    for _ in range(8):
        for micro in next(steps).micro_batches:
            for row, number in zip(micro.data["input_ids"], micro.samples, strict=True):
                ids = row[row != data.collate.pad_token_id]
                found.append((number, text(tokenizer, {"input_ids": ids})))
    steps.close()
    plainly = prepared(folder, tokenizer, plain(folder), run="plainly").train
    assert dict(found) == {n: text(tokenizer, plainly[n]) for n in range(8, 40)}


def test_blocks_come_and_go(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder))
    loader = Loader(data.train, data.collate, SequentialPlan(1 << 40, 400, 5), Division(5))
    most = 0
    for number, step in zip(range(30), loader.steps(), strict=False):
        blocks = {p.name for p in (folder / "run" / "stream").glob("block-*")}
        if number == 8:
            loader.state(step.global_batch.position)
            kept = f"block-{data.train._kept}"
        most = max(most, len(blocks))
        if number > 8:
            assert kept in blocks
    assert most <= 8
    assert not list((folder / "run" / "stream").glob("removed-*"))


def test_sources_of_tokens(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder), pack_samples=True)
    letters = {tokenizer.convert_tokens_to_ids(n): k for k, n in enumerate("ab")}
    for number in range(8):
        sample = data.train[number]
        for token, source in zip(sample["input_ids"], sample["source_ids"], strict=True):
            assert letters.get(int(token), int(source)) == source


def test_bad_rows(folder, tokenizer):
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    data = prepared(folder, tokenizer, plain(folder, "a"))
    with pytest.raises(RecipeError, match=r"a\.jsonl:24"):
        texts(tokenizer, data.train, 0, 30)
    data = prepared(folder, tokenizer, plain(folder, "a"), on_bad_sample="skip", run="skips")
    assert set(texts(tokenizer, data.train, 0, 29)) == {f"a{n}" for n in range(23)}


def test_sources_that_give_nothing(folder, tokenizer):
    (folder / "b.jsonl").write_text("")
    with pytest.raises(RecipeError, match="holds no row"):
        prepared(folder, tokenizer, plain(folder)).train[0]
    data = prepared(
        folder, tokenizer, plain(folder, "a"), max_length=2, long_samples="drop", run="x"
    )
    with pytest.raises(RecipeError, match="gave no sample"):
        data.train[0]


def test_a_child_that_is_killed_is_named(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder))
    data.train[0]
    child = data.train._preparer._process
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    with pytest.raises(RunError, match=r"prepares the stream is gone \(signal 9\)"):
        texts(tokenizer, data.train, 0, 90)


def test_the_child_ends_with_its_owner(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder))
    data.train[0]
    pid = data.train._preparer._process.pid
    del data
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return
        time.sleep(0.05)
    raise AssertionError("the child goes on")


def test_what_a_stream_does_not_know(folder, tokenizer):
    data = prepared(folder, tokenizer, plain(folder))
    with pytest.raises(RecipeError, match="not known before they are read"):
        data.train.lengths.sum()
    assert "stream" in data.train.sample_id(10**9)
    sample = data.train.located([3])[0]
    assert str(sample) == "3"
    assert ".jsonl:" in data.train.sample_id(3)
    assert ".jsonl:" in pickle.loads(pickle.dumps(data.train)).sample_id(sample)
    assert data.facts == {"max_length": 32, "streaming_window": 10}
    assert "streamed in blocks of 10 rows" in data.report
