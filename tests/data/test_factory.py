"""From files to samples: what is trained, cut, packed, held out, cached and reported."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from arctic_like.data import encode, encoders
from arctic_like.data.factory import (
    CausalDataFactory,
    SFTDataFactory,
    tokenizer_key,
)
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World

ASSISTANT = "<|assistant|>"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def chat(question, answer, **more):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **more,
    }


@pytest.fixture
def folder(tmp_path):
    rows = [chat(f"say {i}", "ab" * (i % 9) + str(i)) for i in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": "abc" * i}) + "\n" for i in range(1, 30))
    )
    return tmp_path


def prepared(folder, tokenizer, *, factory=SFTDataFactory, max_positions=512, **more):
    source = "train.jsonl" if factory is SFTDataFactory else "texts.jsonl"
    config = factory.config_type.model_validate(
        {"sources": str(folder / source), "max_length": 64, "cache_dir": folder / "cache", **more}
    )
    return factory(config).build(
        tokenizer=tokenizer, output_dir=folder, seed=3, world=World(), max_positions=max_positions
    )


def documents(samples):
    """Every document of a set: (tokens, labels), taken apart where position ids restart."""
    found = []
    for index in range(len(samples)):
        sample = samples[index]
        assert all(sample[key].dtype == np.int64 for key in sample)
        starts = np.flatnonzero(sample["position_ids"] == 0)
        for start, end in zip(starts, [*starts[1:], len(sample["labels"])], strict=True):
            assert sample["position_ids"][start:end].tolist() == list(range(end - start))
            found.append(
                (sample["input_ids"][start:end].tolist(), sample["labels"][start:end].tolist())
            )
    return found


def trained_text(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


def test_what_is_trained(folder, tokenizer):
    data = prepared(folder, tokenizer, pack_samples=False)
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()]
    assert len(data.train) == len(rows)
    for index, row in enumerate(rows):
        sample = data.train[index]
        answer = row["messages"][1]["content"]
        assert tokenizer.decode(sample["input_ids"]) == (
            f"<|user|>{row['messages'][0]['content']}<|end|>{ASSISTANT}{answer}<|end|>"
        )
        assert trained_text(tokenizer, sample["labels"]) == answer + "<|end|>"
        where = sample["labels"] != -100
        assert (sample["labels"][where] == sample["input_ids"][where]).all()
        assert data.train.weights[index] == (sample["labels"][1:] != -100).sum()
        assert data.train.lengths[index] == len(sample["labels"])
        assert data.train.sample_id(index) == f"train.jsonl:{index + 1}"


def test_packed_is_the_same_documents(folder, tokenizer):
    plain = prepared(folder, tokenizer, pack_samples=False)
    packed = prepared(folder, tokenizer)
    assert len(packed.train) < len(plain.train)
    assert sorted(documents(packed.train)) == sorted(documents(plain.train))
    assert packed.train.lengths.max() <= 64
    assert packed.train.weights.sum() == plain.train.weights.sum() == packed.facts["trained_tokens"]
    assert packed.facts["tokens"] == plain.facts["tokens"] == packed.train.lengths.sum()
    assert packed.facts["fill_rate"] == pytest.approx(packed.train.lengths.mean() / 64)
    counts = [sum(s.count("train.jsonl:") for s in [packed.train.sample_id(i)]) for i in range(3)]
    assert all(1 <= count <= 3 for count in counts)


def test_always_max_length(folder, tokenizer):
    data = prepared(folder, tokenizer, always_max_length=True)
    assert (data.train.lengths[:-1] == 64).all()
    assert data.train.lengths.sum() == prepared(folder, tokenizer).train.lengths.sum()
    assert all(labels[0] == -100 for _, labels in documents(data.train))
    labels = [(data.train[i]["labels"] != -100).sum() for i in range(len(data.train))]
    assert data.train.weights.tolist() == labels


@pytest.mark.parametrize("policy", ["drop", "truncate_left", "truncate_right", "split"])
def test_long_samples(folder, tokenizer, policy):
    whole = documents(prepared(folder, tokenizer, pack_samples=False).train)
    limit = 20
    data = prepared(folder, tokenizer, pack_samples=False, max_length=limit, long_samples=policy)
    found = documents(data.train)
    long = [ids for ids, _ in whole if len(ids) > limit]
    assert data.facts["long"] == len(long) > 0
    assert all(len(ids) <= limit for ids, _ in found)
    short = [pair for pair in whole if len(pair[0]) <= limit]
    assert all(pair in found for pair in short)
    if policy == "drop":
        assert found == short
        assert (data.facts["dropped"], data.facts["truncated"]) == (len(long), 0)
        assert f"{len(long)} documents were too long and dropped" in data.report
        return
    heads = {"truncate_left": lambda ids: ids[-limit:], "truncate_right": lambda ids: ids[:limit]}
    if policy in heads:
        assert sorted(ids for ids, _ in found) == sorted(
            heads[policy](ids) if len(ids) > limit else ids for ids, _ in whole
        )
        assert data.facts["truncated"] == len(long)
    else:
        assert data.facts["truncated"] + data.facts["cut_to_nothing"] == len(long)
    assert all(labels[0] == -100 for _, labels in found)
    assert all(any(label != -100 for label in labels) for _, labels in found)


def test_long_samples_error(folder, tokenizer):
    with pytest.raises(RecipeError) as caught:
        prepared(folder, tokenizer, max_length=20, long_samples="error")
    text = str(caught.value)
    assert "data.max_length: " in text
    assert "longer than 20 tokens, the longest (train.jsonl:" in text


def test_cut_to_nothing_is_counted(tmp_path, tokenizer):
    rows = [chat("a long question" * 3, "x"), chat("q", "y")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepared(tmp_path, tokenizer, max_length=20, long_samples="truncate_right")
    assert data.facts["cut_to_nothing"] == data.facts["dropped"] == 1
    assert (data.facts["truncated"], data.facts["samples"]) == (0, 1)
    assert "kept no trained token" in data.report


def test_max_length(folder, tokenizer):
    assert (
        prepared(folder, tokenizer, max_length=None, max_positions=100).facts["max_length"] == 100
    )
    with pytest.raises(
        RecipeError, match=r"data\.max_length: \(64\) exceeds the model's 32 positions"
    ):
        prepared(folder, tokenizer, max_positions=32)
    with pytest.raises(RecipeError, match=r"data\.max_length: is needed"):
        prepared(folder, tokenizer, max_length=None, max_positions=None)


def test_filter_samples(folder, tokenizer):
    with pytest.raises(RecipeError, match=r"data\.filter_samples: is off"):
        prepared(folder, tokenizer, filter_samples=False)
    one = prepared(folder, tokenizer, filter_samples=False, long_samples="split", max_length=20)
    assert one.facts["truncated"]


def test_mask_inputs_off(folder, tokenizer):
    for ids, labels in documents(prepared(folder, tokenizer, mask_inputs=False).train):
        assert labels == [-100, *ids[1:]]


def test_ignore_empty_think(tmp_path, tokenizer):
    rows = [chat("q", "<think>\n\n</think>\n\nyes"), chat("q", "<think>hm</think>yes")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepared(tmp_path, tokenizer, ignore_empty_think=True, pack_samples=False)
    told = [trained_text(tokenizer, data.train[i]["labels"]) for i in range(2)]
    assert told == ["yes<|end|>", "<think>hm</think>yes<|end|>"]


def test_texts(folder, tokenizer):
    data = prepared(folder, tokenizer, factory=CausalDataFactory, pack_samples=False)
    end = tokenizer.eos_token_id
    rows = [json.loads(line)["text"] for line in (folder / "texts.jsonl").open()]
    # texts of more than 64 tokens are split, none of their tokens lost
    joined = [token for ids, _ in documents(data.train) for token in ids]
    assert joined == [token for text in rows for token in [*text.encode(), end]]
    for ids, labels in documents(data.train):
        assert labels == [-100, *ids[1:]]


def test_tokenised_already(tmp_path, tokenizer):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [4, 5]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name_or_path": str(tmp_path / "train.jsonl"), "process": False}
    data = prepared(tmp_path, tokenizer, sources=[source], pack_samples=False)
    assert documents(data.train) == [([1, 2, 3], [-100, -100, 3]), ([4, 5], [-100, 5])]
    (tmp_path / "train.jsonl").write_text('{"input_ids": [1, 999]}\n')
    with pytest.raises(RecipeError, match=r"train\.jsonl:1 has tokens from 1 to 999"):
        prepared(tmp_path, tokenizer, sources=[source])


def test_train_eval_split(folder, tokenizer):
    data = prepared(folder, tokenizer, train_eval_split=[0.8, 0.2], pack_samples=False)
    assert list(data.evaluation) == ["eval"]
    train = {data.train.sample_id(i) for i in range(len(data.train))}
    held = {data.evaluation["eval"].sample_id(i) for i in range(len(data.evaluation["eval"]))}
    assert (len(train), len(held)) == (48, 12)
    assert not train & held
    again = prepared(folder, tokenizer, train_eval_split=[0.8, 0.2], pack_samples=False, seed=9)
    assert {again.train.sample_id(i) for i in range(48)} != train


def test_evaluation_sets(folder, tokenizer):
    path = str(folder / "train.jsonl")
    data = prepared(
        folder,
        tokenizer,
        eval_sources={
            "few": f"{path}:train[:5]",
            "both": [path, {"type": "file", "name_or_path": path}],
        },
        pack_samples=False,
    )
    assert {name: len(one) for name, one in data.evaluation.items()} == {"few": 5, "both": 120}
    assert data.evaluation["both"].sample_id(60) == "train.jsonl:1"
    assert (data.evaluation["both"][60]["labels"] == data.train[0]["labels"]).all()
    assert list(prepared(folder, tokenizer, eval_sources=[path]).evaluation) == ["eval"]
    with pytest.raises(RecipeError, match="names a set 'train'"):
        prepared(folder, tokenizer, eval_sources={"train": path})


def test_untrained_documents_are_counted(folder, tokenizer):
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n")
    data = prepared(folder, tokenizer)
    assert (data.facts["untrained"], data.facts["dropped"]) == (1, 1)
    assert "1 documents have no trained token" in data.report


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"data\.sources: holds no row \(.*train\.jsonl\)"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            "holds no trained token in 1 documents",
        ),
        ([chat("q", "a" * 100)], "leaves no sample .* 1 have more than 64 tokens"),
    ],
)
def test_empty_sets(tmp_path, tokenizer, rows, message):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RecipeError, match=message):
        prepared(tmp_path, tokenizer)


def test_nothing_to_train_on(folder, tokenizer):
    with pytest.raises(RecipeError, match=r"data\.sources: is empty"):
        prepared(folder, tokenizer, sources=[])


def test_broken_rows_name_their_place(folder, tokenizer):
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(chat("q", None)) + "\n")
    for num_proc in (1, 2):
        with pytest.raises(
            RecipeError, match=r"train\.jsonl:61 has null as the content of message 2"
        ):
            prepared(folder, tokenizer, num_proc=num_proc)


def test_processes_change_nothing(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_ROWS", 7)
    one = prepared(folder, tokenizer, cache_dir=folder / "one")
    two = prepared(folder, tokenizer, cache_dir=folder / "two", num_proc=2)
    assert one.facts == two.facts
    assert [one.train.sample_id(i) for i in range(len(one.train))] == [
        two.train.sample_id(i) for i in range(len(two.train))
    ]
    assert documents(one.train) == documents(two.train)


def test_a_warm_cache_tokenises_nothing(folder, tokenizer, monkeypatch):
    first = prepared(folder, tokenizer)

    def refuse(*args, **kwargs):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(encoders.TextEncoder, "__call__", refuse)
    second = prepared(folder, tokenizer, fail_on_missing_cache=True)
    assert documents(first.train) == documents(second.train)
    # another length or packing needs no tokens again
    assert prepared(folder, tokenizer, max_length=48, pack_samples=False).facts["samples"]
    for changed in ({"mask_inputs": False}, {"sources": [{"name_or_path": str(folder / "train.jsonl"),
                                                          "sample_count": 5}]}):  # fmt: skip
        with pytest.raises(AssertionError, match="tokenised again"):
            prepared(folder, tokenizer, **changed)
        with pytest.raises(RecipeError, match="not in the cache"):
            prepared(folder, tokenizer, fail_on_missing_cache=True, **changed)


def test_tokenizer_key(tokenizer):
    from arctic_like.tokenizer.byte import byte_tokenizer

    other = byte_tokenizer()
    assert tokenizer_key(other) == tokenizer_key(tokenizer)
    other("x", truncation=True, max_length=1, padding="max_length")
    assert tokenizer_key(other) == tokenizer_key(tokenizer)
    other.chat_template += " "
    assert tokenizer_key(other) != tokenizer_key(tokenizer)
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    assert tokenizer_key(other) != tokenizer_key(tokenizer)


def test_sets_travel_to_other_processes(folder, tokenizer):
    data = prepared(folder, tokenizer)
    copy, collate = pickle.loads(pickle.dumps((data.train, data.collate)))
    assert len(pickle.dumps(data.train)) < 2000
    assert documents(copy) == documents(data.train)
    batch = collate([copy[0], copy[1]])
    assert batch["input_ids"].shape[1] <= 64
    for wrong in (-1, len(copy)):
        with pytest.raises(IndexError):
            copy[wrong]


def test_pad_to_max_length(folder, tokenizer):
    data = prepared(folder, tokenizer, pad_to="max_length", pack_samples=False)
    assert data.collate([data.train[0]])["labels"].shape == (1, 64)


def test_problems_are_placed(folder):
    config = SFTDataFactory.config_type.model_validate(
        {"sources": [str(folder / "train.jsonl"), "gone.jsonl"], "eval_sources": {"held": "./gone"}}
    )
    places = [problem.place for problem in SFTDataFactory(config).problems()]
    assert places == ["data.sources.1.name_or_path", "data.eval_sources.held.0.name_or_path"]


def test_evaluation_keeps_a_slice_and_a_mapping(folder, tokenizer):
    path = str(folder / "train.jsonl")
    mapping = {"train": "train_sft", "eval": "test_sft"}
    sources = [{"name_or_path": f"{path}:[:3]", "split_mapping": mapping}]
    data = prepared(folder, tokenizer, eval_sources=sources, pack_samples=False)
    assert len(data.evaluation["eval"]) == 3


def test_light_to_import():
    import subprocess
    import sys

    code = (
        "import sys, arctic_like.data.factory, arctic_like.data.sources, arctic_like.data.base;"
        "print([m for m in ('numpy', 'torch', 'pyarrow', 'datasets', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
