"""Mixing: shares exact to one sample, sources told apart, nothing both trained and held out."""

from __future__ import annotations

import json
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from arctic_like.data.balance import Division
from arctic_like.data.factory import CausalDataConfig, CausalDataFactory
from arctic_like.data.loader import Loader
from arctic_like.data.mix import draws, titles
from arctic_like.data.order import BatchPlan, MixedPlan
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World

some = st.lists(
    st.tuples(st.integers(1, 5000), st.integers(1, 50), st.sampled_from([0.5, 1.0, 2.0])),
    min_size=1,
    max_size=6,
)


@given(sources=some, until_all=st.booleans())
def test_shares_are_exact_to_one_sample(sources, until_all):
    sizes, weights, repeats = zip(*sources, strict=True)
    found = draws(sizes, weights=weights, repeats=repeats, until_all=until_all)
    total = sum(found)
    for count, weight in zip(found, weights, strict=True):
        assert abs(count - Fraction(total * weight, sum(weights))) < 1
    passes = [Fraction(repeat) * size for size, repeat in zip(sizes, repeats, strict=True)]
    if until_all:
        assert all(count >= int(wanted) for count, wanted in zip(found, passes, strict=True))
    else:
        assert all(count <= -(-wanted // 1) for count, wanted in zip(found, passes, strict=True))
    # as long, or as short, as that can be: one of the sources is the bound
    assert any(abs(count - wanted) <= 1 + wanted / total * len(sizes) for count, wanted in
               zip(found, passes, strict=True))  # fmt: skip


@given(sources=some, data=st.data())
def test_shares_by_token(sources, data):
    sizes, weights, _ = zip(*sources, strict=True)
    tokens = [size * data.draw(st.integers(1, 300)) for size in sizes]
    found = draws(sizes, weights=weights, repeats=[1.0] * len(sizes), tokens=tokens, until_all=True)
    mean = [total / size for total, size in zip(tokens, sizes, strict=True)]
    drawn = sum(count * one for count, one in zip(found, mean, strict=True))
    for count, one, weight in zip(found, mean, weights, strict=True):
        # exact to one sample of the source, and to what that does to the whole
        assert abs(count * one - drawn * weight / sum(weights)) <= one + sum(mean)


def test_known_draws():
    assert draws([100, 10], repeats=[1, 1]) == (100, 10)
    assert draws([100, 10], repeats=[0.5, 3]) == (50, 30)
    assert draws([100, 3], repeats=[1, 0.1]) == (100, 1), "never none"
    assert draws([10, 10], repeats=[1, 1], weights=[0.7, 0.3]) == (10, 4)
    assert draws([7, 3], repeats=[1, 1], weights=[0.7, 0.3]) == (7, 3), "0.7 is 7/10"
    assert draws([10, 10], repeats=[1, 1], weights=[7, 3], until_all=True) == (24, 10)
    assert draws([10, 10], repeats=[2, 1], weights=[7, 3]) == (20, 8)
    # samples of the second are ten times as long
    assert draws([100, 100], repeats=[1, 1], weights=[1, 1], tokens=[100, 1000]) == (100, 10)


@given(sources=some.filter(lambda s: len(s) > 1), seed=st.integers(0, 9), batch=st.integers(1, 40),
       ranks=st.sampled_from([1, 2, 3, 8]), later=st.sampled_from([1, 2, 3, 8]))  # fmt: skip
def test_all_ranks_together_see_each_sample_once_a_pass(sources, seed, batch, ranks, later):
    """One pass of each source, resumed in the middle at another number of ranks."""
    sizes = [size % 50 + 1 for size, _, _ in sources]
    plan = MixedPlan(tuple(sizes), tuple(sizes), batch, seed)
    lengths = np.random.default_rng(0).integers(1, 99, sum(sizes))
    seen, position = [], 0
    while position < sum(sizes):
        world = ranks if position < sum(sizes) // 2 else later
        step = plan.at(position)
        shares = Division(3, balance=True).shares(step.samples, lengths[step.samples], ranks=world)
        assert len(shares) == world
        seen += [sample for share in shares for chunk in share for sample in chunk]
        position = step.next_position
    assert sorted(seen) == list(range(sum(sizes)))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def folder(tmp_path):
    """Three sources, told apart by their letter; documents of 5 to 24 tokens."""
    for letter, count in (("a", 40), ("b", 20), ("c", 10)):
        rows = [{"text": letter * (4 + n % 20)} for n in range(count)]
        (tmp_path / f"{letter}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def source(folder, letter, **more):
    return {"name_or_path": str(folder / f"{letter}.jsonl"), **more}


def prepared(folder, tokenizer, sources, **more):
    config = CausalDataConfig.model_validate(
        {"sources": sources, "max_length": 32, "cache_dir": folder / "cache", **more}
    )
    return CausalDataFactory(config).build(
        tokenizer=tokenizer, output_dir=folder, seed=3, world=World()
    )


def letters(tokenizer, sample):
    return set(tokenizer.decode(sample["input_ids"])) & set("abc")


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_of_a_weighted_mix(folder, tokenizer, pack):
    weights = {"a": 2, "b": 1, "c": 1}
    data = prepared(
        folder, tokenizer, [source(folder, n, weight=w) for n, w in weights.items()],
        pack_samples=pack, mix_until="all_exhausted",
    )  # fmt: skip
    plan = data.plan(8)
    drawn = {"a": 0, "b": 0, "c": 0}
    for number in range(plan.batches_per_epoch):
        for index in plan.at(8 * number).samples:
            (letter,) = letters(tokenizer, data.train[int(index)])
            drawn[letter] += 1
    total = sum(drawn.values())
    assert total == plan.samples_per_epoch
    assert all(abs(drawn[n] - total * w / 4) < 1 for n, w in weights.items())
    mix = {one["title"]: one for one in data.facts["mix"]}
    assert {n: mix[f"{n}.jsonl"]["draws"] for n in "abc"} == drawn
    assert sum(one["token_share"] for one in mix.values()) == pytest.approx(1)
    assert re.search(
        r"a\.jsonl: \d+ samples \((50|49|51)\.\d%\), \d+\.\d% of the tokens", data.report
    )
    assert data.facts["samples"] == len(data.train)
    assert data.facts["tokens"] == data.train.lengths.sum()
    assert data.facts["fill_rate"] == pytest.approx(data.train.lengths.mean() / 32)


def test_weights_by_token(folder, tokenizer):
    sources = [source(folder, "a", weight=1), source(folder, "c", weight=1)]
    data = prepared(folder, tokenizer, sources, mix_by="token", pack_samples=False)
    mix = data.facts["mix"]
    assert mix[0]["sample_share"] < 0.45, "its documents are longer on average"
    assert all(abs(one["token_share"] - 0.5) < 0.05 for one in mix)


def test_repeat(folder, tokenizer):
    sources = [source(folder, "a", repeat=0.5), source(folder, "b", repeat=3)]
    data = prepared(folder, tokenizer, sources, pack_samples=False)
    plan = data.plan(80)
    first, second = (plan.at(position).samples for position in (0, 80))
    counts = np.bincount(first, minlength=60)
    assert counts[40:].tolist() == [3] * 20
    assert sorted(counts[:40].tolist()) == [0] * 20 + [1] * 20
    assert (counts[:40] + np.bincount(second, minlength=60)[:40] == 1).all(), "then the other half"


@pytest.mark.parametrize("weights", [(None, None), (1, 2)])
def test_held_out_rows_are_not_trained(folder, tokenizer, weights):
    sources = [
        source(folder, letter, **({"weight": weight} if weight else {}))
        for letter, weight in zip("ab", weights, strict=True)
    ]
    data = prepared(folder, tokenizer, sources, train_eval_split=[0.75, 0.25])
    sets = data.train, data.evaluation["eval"]
    places = [{p for i in range(len(one)) for p in one.places(i)} for one in sets]
    assert not places[0] & places[1]
    assert len(places[0]) == 45
    assert len(places[1]) == 15
    # a mix holds out a quarter of each source
    held_out = {letter: sum(p.startswith(letter) for p in places[1]) for letter in "ab"}
    assert held_out == {"a": 10, "b": 5} or weights == (None, None)


def test_drop_last_keeps_the_shares(folder, tokenizer):
    sources = [source(folder, "a", weight=3), source(folder, "b", weight=1)]
    data = prepared(folder, tokenizer, sources, pack_samples=False, drop_last=True)
    plan = data.plan(16)
    assert plan.samples_per_epoch == 48
    samples = np.concatenate([plan.at(16 * n).samples for n in range(3)])
    assert (samples < 40).sum() == 36
    with pytest.raises(RecipeError, match="drop_last"):
        data.plan(1000)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_every_token_has_its_source(folder, tokenizer, mixed, pack):
    more = {"weight": 1} if mixed else {}
    data = prepared(
        folder, tokenizer, [source(folder, n, **more) for n in "cab"], pack_samples=pack
    )
    assert data.sources == ("c.jsonl", "a.jsonl", "b.jsonl")
    again = pickle.loads(pickle.dumps(data.train))
    for index in range(len(data.train)):
        sample = data.train[index]
        assert all(len(array) == len(sample["input_ids"]) for array in sample.values())
        letter = {tokenizer.convert_tokens_to_ids(n): k for k, n in enumerate("cab")}
        for token, number in zip(sample["input_ids"], sample["source_ids"], strict=True):
            assert letter.get(int(token), int(number)) == number
        assert (again[index]["source_ids"] == sample["source_ids"]).all()
    batch = data.collate([data.train[0], data.train[len(data.train) - 1]])
    assert batch["source_ids"].shape == batch["input_ids"].shape
    padding = batch["source_ids"] == -1
    assert (batch["labels"][padding] == -100).all()


def test_sources_are_told_apart_where_there_are_several(folder, tokenizer):
    one, two = [source(folder, "a")], [source(folder, "a"), source(folder, "b")]
    assert "source_ids" not in prepared(folder, tokenizer, one).train[0]
    assert "source_ids" in prepared(folder, tokenizer, one, source_metrics=True).train[0]
    assert "source_ids" not in prepared(folder, tokenizer, two, source_metrics=False).train[0]
    data = prepared(folder, tokenizer, two, eval_sources=two)
    assert "source_ids" not in data.evaluation["eval"][0]


def test_lengths_in_one_batch_are_alike(folder, tokenizer):
    data = prepared(
        folder, tokenizer, [source(folder, "a", weight=1), source(folder, "b", weight=1)],
        pack_samples=False, group_by_length=True,
    )  # fmt: skip
    plan = data.plan(4)
    spans = []
    for number in range(plan.batches_per_epoch):
        lengths = data.train.lengths[plan.at(4 * number).samples]
        spans.append(int(lengths.max() - lengths.min()))
    assert np.mean(spans) < 3


def test_budget_and_padding_through_the_loader(folder, tokenizer):
    data = prepared(folder, tokenizer, [source(folder, "a")], pack_samples=False, div_length=8)
    loaders = [
        Loader(data.train, data.collate, BatchPlan(40, 16, 1),
               Division(1, max_tokens=64, balance=True), rank=rank, size=2)
        for rank in range(2)
    ]  # fmt: skip
    for steps in zip(*(one.steps() for one in loaders), strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
        work = [m for step in steps for m in step.micro_batches if not m.idle]
        assert sorted(s for m in work for s in m.samples) == sorted(
            steps[0].global_batch.samples.tolist()
        )
        for micro in work:
            rows, length = micro.data["input_ids"].shape
            assert length % 8 == 0
            assert rows * length <= 64
        if steps[0].global_batch.epoch:
            break


def test_titles(folder):
    config = CausalDataConfig.model_validate(
        {"sources": ["/x/train.jsonl", "/y/train.jsonl", "org/name:train",
                     {"name_or_path": "/z", "label": "mine"}]}
    )  # fmt: skip
    assert titles(config.sources) == ("train.jsonl", "train.jsonl#2", "org/name:train", "mine")


def test_a_source_without_a_share_is_named(folder, tokenizer):
    sources = [source(folder, "a", weight=1e6), source(folder, "b", weight=1)]
    with pytest.raises(RecipeError, match=r"sources\.1\.weight.*has none of b\.jsonl"):
        prepared(folder, tokenizer, sources)
    (folder / "c.jsonl").write_text(json.dumps({"text": "c" * 99}) + "\n")
    sources = [source(folder, "a", weight=1), source(folder, "c", weight=1)]
    with pytest.raises(RecipeError, match=r"sources\.1: \(c\.jsonl\) leaves no sample"):
        prepared(folder, tokenizer, sources, long_samples="drop")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sources": [{"name_or_path": "a", "weight": 1}, "b"]}, "has no weight"),
        ({"sources": ["a"], "mix_by": "token"}, "no source has one"),
        ({"sources": ["a"], "mix_until": "all_exhausted"}, "no source has one"),
        ({"sources": ["a"], "eval_sources": [{"name_or_path": "b", "weight": 1}]}, "every sample once"),
        ({"sources": ["a"], "eval_sources": [{"name_or_path": "b", "repeat": 2}]}, "every sample once"),
        ({"sources": ["a"], "streaming": True, "group_by_length": True}, "whole set"),
        ({"sources": ["a"], "streaming": True, "train_eval_split": [0.9, 0.1]}, "whole set"),
        ({"sources": [{"name_or_path": "a", "sample_count": 3}], "streaming": True}, "whole set"),
        ({"sources": [{"name_or_path": "a", "repeat": 3}], "streaming": True}, "whole set"),
    ],
)  # fmt: skip
def test_contradictions(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        CausalDataConfig.model_validate(settings)
