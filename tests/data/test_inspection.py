"""Numbers of a set against plain counting, and what `inspect` tells of preferences and mixes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data import inspection
from arctic_like.data.decoding import TokenText
from arctic_like.registry import build, lookup
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World


def prepared(tmp_path, type: str, **keys):
    config = lookup("data", type).config_type.model_validate(
        {"type": type, "cache_dir": str(tmp_path / "cache"), "max_length": 64, **keys}
    )
    return build(config, "data").build(
        tokenizer=byte_tokenizer(), output_dir=tmp_path, seed=0, world=World()
    )


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_a_histogram_counts_every_length_once(lengths):
    found = inspection.histogram(np.array(lengths))
    assert sum(found.counts) == len(lengths)
    assert len(found.counts) == len(found.edges) - 1 <= 14
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        assert count == sum(low <= length < high for length in lengths)
    assert (found.smallest, found.largest) == (min(lengths), max(lengths))


def test_a_histogram_of_nothing():
    assert inspection.histogram(np.zeros(0, dtype=np.int64)).counts == [0]


@pytest.mark.parametrize("pack", [True, False])
def test_numbers_of_two_sources_against_plain_counting(tmp_path, pack):
    one = [talk("q" * (n % 7), "a" * (n % 50)) for n in range(40)]  # with repetitions
    two = [talk("other", "b" * 10), talk("other", "b" * 10), talk("long", "c" * 100)]
    held = [talk("other", "b" * 10), talk("new", "d")]
    data = prepared(
        tmp_path, "sft", pack_samples=pack, long_samples="drop",
        sources=[written(tmp_path / "one.jsonl", one), written(tmp_path / "two.jsonl", two)],
        eval_sources=[written(tmp_path / "held.jsonl", held)],
    )  # fmt: skip
    found = inspection.statistics(data, "train")
    # <|user|> q <|end|> <|assistant|> a <|end|>, of which the answer and its end are trained
    texts = [tuple(turn["content"] for turn in row["messages"]) for row in one + two]
    lengths = [4 + len(q) + len(a) for q, a in texts]
    fits = [length <= 64 for length in lengths]
    assert found.facts["tokens"] == sum(n for n, fit in zip(lengths, fits, strict=True) if fit)
    answers = [len(a) + 1 for _, a in texts]
    assert found.facts["trained_tokens"] == sum(
        n for n, fit in zip(answers, fits, strict=True) if fit
    )
    assert found.documents is not None
    assert sum(found.documents.counts) == len(texts)
    assert found.documents.mean == pytest.approx(np.mean(lengths))
    assert found.packed is pack
    assert sum(found.samples.counts) == len(data.train)
    assert found.duplicates is not None
    assert found.duplicates.count == len(texts) - len(set(texts))
    assert ("two.jsonl:1", "two.jsonl:2", 2) in found.duplicates.examples
    assert found.elsewhere == {"eval": 1}
    assert [source["documents"] for source in found.sources] == [40, 3]
    assert inspection.statistics(data, "eval").elsewhere == {"train": 2}
    assert inspection.statistics(data, "eval").duplicates == inspection.Duplicates(0)


def test_every_document_of_every_sample_is_where_it_says(tmp_path):
    rows = [talk(f"question {n}", "x" * (n * 7 % 30)) for n in range(30)]
    data = prepared(tmp_path, "sft", sources=[written(tmp_path / "t.jsonl", rows)])
    text = TokenText(byte_tokenizer())
    seen = []
    for index in range(len(data.train)):
        sample = inspection.view(data.train, index, text)
        assert sample.tokens == data.train.lengths[index]
        assert sample.trained == data.train.weights[index]
        for document in sample.documents:
            number = int(document.place.removeprefix("t.jsonl:"))
            (question, answer) = (turn["content"] for turn in rows[number - 1]["messages"])
            trained = "".join(span.text for span in document.spans if span.trained)
            assert trained == f"{answer}<|end|>"
            rest = "".join(span.text for span in document.spans if not span.trained)
            assert rest == f"<|user|>{question}<|end|><|assistant|>"
            seen.append(number)
    assert sorted(seen) == list(range(1, 31))


def test_a_mix_and_pieces_of_long_texts(tmp_path):
    data = prepared(
        tmp_path, "causal", max_length=16,
        sources=[
            {"name_or_path": written(tmp_path / "a.jsonl", [{"text": "a" * 40}]), "weight": 1},
            {"name_or_path": written(tmp_path / "b.jsonl", [{"text": "b" * 5}] * 3), "weight": 1},
        ],
    )  # fmt: skip
    found = inspection.statistics(data, "train")
    assert [source["title"] for source in found.sources] == list(data.sources)
    assert found.duplicates is not None
    assert found.duplicates.count == 2
    places = [place for n in range(len(data.train)) for place in data.train.places(n)]
    assert {"a.jsonl:1", "a.jsonl:1@16", "a.jsonl:1@32"} <= set(places)
    view = inspection.view(data.train, 0, TokenText(byte_tokenizer()))
    assert [span.trained for span in view.documents[0].spans] == [False, True]
    assert view.documents[0].spans[0].text == "a"  # nothing predicts the first token


def test_preferences_say_which_answer_it_is(tmp_path):
    rows = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    data = prepared(tmp_path, "dpo", sources=[written(tmp_path / "p.jsonl", rows)])
    text = TokenText(byte_tokenizer())
    found = []
    for index in range(len(data.train)):
        sample = inspection.view(data.train, index, text)
        for number, document in enumerate(sample.documents):
            row = rows[int(document.place.removeprefix("p.jsonl:")) - 1]
            which = ("chosen", "rejected")[number % 2]
            assert document.role == f"pair {number // 2}, {which}"
            trained = "".join(span.text for span in document.spans if span.trained)
            assert trained == f"{row[which]}<|end|>"
            found.append((document.place, which))
    assert len(set(found)) == 8
    statistics = inspection.statistics(data, "train")
    assert statistics.facts["pairs"] == 4
    assert statistics.facts["trained_tokens"] == sum(
        len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows
    )


def test_judged_answers_say_whether_they_are_wanted(tmp_path):
    rows = [{"prompt": "p", "completion": f"c{n}", "label": n % 3 == 0} for n in range(6)]
    data = prepared(tmp_path, "kto", sources=[written(tmp_path / "k.jsonl", rows)])
    text = TokenText(byte_tokenizer())
    for index in range(len(data.train)):
        for document in inspection.view(data.train, index, text).documents:
            row = rows[int(document.place.removeprefix("k.jsonl:")) - 1]
            assert document.role == ("desirable" if row["label"] else "undesirable")


@given(st.integers(1, 50), st.integers(0, 60), st.integers(0, 5))
def test_drawn_samples_are_different_ones(size, count, seed):
    found = inspection.chosen(size, count, seed)
    assert found == sorted(set(found)) == inspection.chosen(size, count, seed)
    assert len(found) == min(size, count)
    assert all(0 <= index < size for index in found)
