"""Sets of samples: what becomes of long documents in each source, what is counted, what is read
again."""

from __future__ import annotations

import builtins
import io
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data import hashes
from arctic_like.data.factory import CausalDataFactory
from arctic_like.data.packing import Pieces, repeated
from arctic_like.data.preference import DPODataFactory
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(folder, tokenizer, sources, *, factory=CausalDataFactory, **more):
    config = factory.config_type.model_validate(
        {"sources": sources, "max_length": LENGTH, "cache_dir": folder / "cache", **more}
    )
    return factory(config).build(
        tokenizer=tokenizer, output_dir=folder, seed=3, world=World(), max_positions=512
    )


def documents(samples):
    """Every document of a set: its tokens, taken apart where position ids restart."""
    found = []
    for index in range(len(samples)):
        sample = samples[index]
        starts = np.flatnonzero(sample["position_ids"] == 0)
        found += [part.tolist() for part in np.split(sample["input_ids"], starts[1:])]
    return found


@pytest.fixture
def two(tmp_path):
    """Two sources; every fourth document is longer than `LENGTH`."""
    for name in ("a", "b"):
        texts = [f"{name}{n} " * (30 if n % 4 == 0 else 1 + n % 7) for n in range(40)]
        write(tmp_path / f"{name}.jsonl", texts)
    return tmp_path


@pytest.mark.parametrize("pack", [{}, {"pack_samples": False}, {"always_max_length": True}])
@pytest.mark.parametrize("first", ["drop", "truncate_left", "truncate_right", "split"])
def test_each_source_has_its_policy(two, tokenizer, first, pack):
    sources = [
        {"name_or_path": str(two / "a.jsonl"), "long_samples": first},
        {"name_or_path": str(two / "b.jsonl"), "label": "other"},
    ]
    data = prepared(two, tokenizer, sources, long_samples="drop", **pack)
    alone = [
        prepared(two, tokenizer, [str(two / "a.jsonl")], long_samples=first, pack_samples=False),
        prepared(two, tokenizer, [str(two / "b.jsonl")], long_samples="drop", pack_samples=False),
    ]
    expected = [one for each in alone for one in documents(each.train)]
    if "always_max_length" in pack:
        assert set(data.train.lengths[:-1].tolist()) == {LENGTH}
        assert data.train.lengths[-1] <= LENGTH
        assert sum(map(len, expected)) == data.train.lengths.sum()
    else:
        assert sorted(documents(data.train)) == sorted(expected)
        assert data.train.lengths.max() <= LENGTH
    facts = data.facts
    a, b = facts["sources"]
    assert (a["title"], b["title"]) == ("a.jsonl", "other")
    for one, each, policy in zip((a, b), alone, (first, "drop"), strict=True):
        assert one["long_samples"] == policy
        assert one["documents"] == 40
        assert one["long"] == 10
        assert one["truncated"] == (0 if policy == "drop" else 10)
        assert one["split"] == (10 if policy == "split" else 0)
        assert one["dropped"] == (10 if policy == "drop" else 0)
        assert one["tokens"] == each.train.lengths.sum()
        if "always_max_length" not in pack:
            assert one["trained_tokens"] == each.train.weights.sum()
    for name in ("documents", "long", "truncated", "split", "dropped", "tokens", "trained_tokens"):
        assert facts[name] == a[name] + b[name]
    assert facts["tokens"] == data.train.lengths.sum()
    assert facts["trained_tokens"] == data.train.weights.sum()
    assert "10 documents were too long and" in data.report
    assert max(map(len, data.report.splitlines())) <= 80


def test_one_source_that_refuses_long_documents(two, tokenizer):
    sources = [
        str(two / "a.jsonl"),
        {"name_or_path": str(two / "b.jsonl"), "long_samples": "error"},
    ]
    with pytest.raises(RecipeError, match=r"10 documents are longer .* \(b\.jsonl:13\)"):
        prepared(two, tokenizer, sources)


def test_pairs_have_their_sources_policy_too(tmp_path, tokenizer):
    for name in "ab":
        rows = [
            {"prompt": "say " * (20 if n % 4 == 0 else 1), "chosen": f"{n}", "rejected": f"x{n}"}
            for n in range(20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"name_or_path": str(tmp_path / "a.jsonl"), "long_samples": "truncate_left"},
        str(tmp_path / "b.jsonl"),
    ]
    data = prepared(tmp_path, tokenizer, sources, factory=DPODataFactory)
    a, b = data.facts["sources"]
    assert (a["long"], a["truncated"], a["dropped"]) == (5, 5, 0)
    assert (b["long"], b["truncated"], b["dropped"]) == (5, 0, 5)
    assert data.facts["pairs"] == 35
    assert data.facts["tokens"] == a["tokens"] + b["tokens"] == data.train.lengths.sum()
    assert data.facts["dropped"] == 5


def test_duplicates_in_a_source_and_between_sources(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ["one", "two", "one", "one"])
    write(tmp_path / "b.jsonl", ["two", "three"])
    data = prepared(tmp_path, tokenizer, [str(tmp_path / f"{name}.jsonl") for name in "ab"])
    assert [one["duplicates"] for one in data.facts["sources"]] == [2, 0]
    assert data.facts["duplicates"] == 3
    assert "2 documents repeat another, token for token" in data.report


def test_bad_rows_are_told_once(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [f"text {n}" for n in range(20)])
    with file.open("a") as more:
        more.write("{broken\n" * 3)
    with pytest.raises(RecipeError, match=r"a\.jsonl:21"):
        prepared(tmp_path, tokenizer, [str(file)])
    data = prepared(
        tmp_path, tokenizer, [str(file)], on_bad_sample="skip", train_eval_split=[0.5, 0.5]
    )
    assert data.facts["bad"] == 3
    assert data.report.count("3 rows cannot be used and were skipped, the first: a.jsonl:21") == 1
    assert max(map(len, data.report.splitlines())) <= 80
    (tmp_path / "b.jsonl").write_text("{broken\n")
    with pytest.raises(RecipeError, match=r"holds no row that can be used .* 1 were skipped"):
        prepared(tmp_path, tokenizer, [str(tmp_path / "b.jsonl")], on_bad_sample="skip")


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened, by whatever way Python has."""
    found: list[str] = []
    for module, name in ((builtins, "open"), (io, "open"), (os, "open")):
        real = getattr(module, name)

        def noted(file, *values, real=real, **more):
            found.append(str(file))
            return real(file, *values, **more)

        monkeypatch.setattr(module, name, noted)
    return found


def test_a_second_start_reads_no_source(two, tokenizer, opened, monkeypatch):
    monkeypatch.setattr(hashes, "_FRESH_SECONDS", -1e9)
    sources = [str(two / "a.jsonl"), {"name_or_path": str(two / "b.jsonl"), "sample_count": 9}]
    first = prepared(two, tokenizer, sources)
    assert str(two / "a.jsonl") in opened
    opened.clear()
    again = prepared(two, tokenizer, sources)
    assert documents(again.train) == documents(first.train)
    assert any("cache" in path for path in opened)
    assert not [path for path in opened if path.endswith(("a.jsonl", "b.jsonl"))]
    opened.clear()
    prepared(two, tokenizer, sources, verify_content=True)
    assert [path for path in opened if path.endswith("a.jsonl")]
    opened.clear()
    write(two / "a.jsonl", ["something else"])
    changed = prepared(two, tokenizer, sources)
    assert changed.facts["sources"][0]["documents"] == 1
    # the other one is not read again
    assert not [path for path in opened if path.endswith("b.jsonl")]


def test_another_length_reads_nothing_either(two, tokenizer, monkeypatch):
    prepared(two, tokenizer, [str(two / "a.jsonl")])
    monkeypatch.setattr("arctic_like.data.encoders.DocumentEncoder.__call__", None)
    data = prepared(two, tokenizer, [str(two / "a.jsonl")], max_length=32)
    assert data.train.lengths.max() <= 32


def test_an_entry_of_another_version_is_made_again(two, tokenizer):
    prepared(two, tokenizer, [str(two / "a.jsonl")])
    markers = list((two / "cache").glob("*/*/complete.json"))
    assert len(markers) == 2
    for marker in markers:
        content = json.loads(marker.read_text())
        assert content["version"]
        marker.write_text(json.dumps({**content, "version": 1, "documents": 10**6}))
    assert prepared(two, tokenizer, [str(two / "a.jsonl")]).facts["documents"] == 40


@pytest.mark.parametrize("fill", [False, True])
def test_a_small_set_is_repeated_until_a_sample_is_full(tmp_path, tokenizer, fill):
    file = write(tmp_path / "a.jsonl", ["abcde", "fghijklmno"])  # 6 and 11 tokens with their ends
    plain = prepared(tmp_path, tokenizer, [str(file)])
    assert plain.train.lengths.tolist() == [17]
    data = prepared(
        tmp_path, tokenizer, [str(file)], repeat_to_pack_max_length=True, always_max_length=fill,
        eval_sources=[{"name_or_path": str(file), "split": "train"}],
    )  # fmt: skip
    # three times both is 51, and the first once more is 57; the second would not fit
    assert data.train.lengths.tolist() == [64 if fill else 57]
    assert data.facts["repeated"] == (6 if fill else 5)
    found = documents(data.train)
    whole = documents(plain.train)
    counts = [sum(one == document for one in found) for document in whole]
    assert sorted(counts) == ([3, 4] if not fill else sorted(counts))
    assert data.evaluation["eval"].lengths.tolist() == [17]
    assert "documents are there again" in data.report
    large = prepared(
        tmp_path, tokenizer, [str(file)], repeat_to_pack_max_length=True, max_length=16
    )
    assert sorted(documents(large.train)) == sorted(whole)


@given(lengths=st.lists(st.integers(1, 30), max_size=12), capacity=st.integers(1, 100))
def test_repeated(lengths, capacity):
    sizes = np.array(lengths, dtype=np.int64)
    pieces = Pieces(np.arange(len(sizes)), np.zeros_like(sizes), sizes)
    total = int(sizes.sum())
    for exactly in (False, True):
        more = repeated(pieces, capacity=capacity, exactly=exactly)
        if not 0 < total < capacity:
            assert more is pieces
            continue
        assert (more.document == np.arange(len(more)) % len(sizes)).all()
        following = int(sizes[len(more) % len(sizes)])
        if exactly:
            assert more.length.sum() == capacity
            assert 0 < more.length[-1] <= sizes[more.document[-1]]
        else:
            assert more.length.sum() <= capacity < more.length.sum() + following
    assert pieces.length.tolist() == lengths


def test_samples_without_a_label_are_left_out(tmp_path, tokenizer):
    rows = [{"input_ids": [5] * 200, "labels": [-100] * 190 + [5] * 10}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    data = prepared(
        tmp_path, tokenizer, [{"name_or_path": str(tmp_path / "a.jsonl"), "process": False}],
        always_max_length=True, max_length=50, long_samples="split",
    )  # fmt: skip
    assert (data.train.weights > 0).all()
    assert data.facts["tokens"] == data.train.lengths.sum()
    assert data.facts["trained_tokens"] == data.train.weights.sum()
