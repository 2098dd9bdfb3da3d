"""Preferences: against transformers' own rendering and tokens; cut, packed and held out as wholes."""

from __future__ import annotations

import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.base import SourceConfig
from arctic_like.data.encoders import MaskRules
from arctic_like.data.preference import DPODataFactory, KTODataFactory
from arctic_like.data.preference_encoders import PairEncoder, UnpairedEncoder
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from arctic_like.world import World
from tests.data.chat_templates import CASES
from tests.data.test_masks import content
from tests.data.tokenizers_for_tests import tokenizer_for


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def encoder(kind=PairEncoder, tokenizer=None, **more):
    options = {"max_prompt_length": 1000, "truncation": "keep_start", **more}
    rules = options.pop("rules", MaskRules())
    return kind(tokenizer or byte_tokenizer(), SourceConfig(), rules, **options)


def documents(encoded):
    ends = np.cumsum(encoded.lengths)
    return [
        (encoded.tokens[a:b].tolist(), encoded.trained[a:b].tolist())
        for a, b in zip(ends - encoded.lengths, ends, strict=True)
    ]


@pytest.mark.parametrize("kind", ["byte", "bpe", "bpe-across"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "phi"])
def test_pairs_are_transformers_own_tokens(name, kind):
    """Both documents are what `apply_chat_template` makes of prompt + answer; what is trained
    decodes to the rest of the text behind the prompt with its generation prompt."""
    tokenizer = tokenizer_for(name, kind=kind, trim_offsets=False)
    encode = encoder(tokenizer=tokenizer)

    @given(st.lists(content, min_size=1, max_size=3), content, content)
    def check(said, one, other):
        prompt = [(user, assistant)[n % 2](text) for n, text in enumerate(said)]
        prompt = prompt if len(prompt) % 2 else prompt[1:]
        prompt = [user("q"), *prompt[1:]] if prompt else [user("q")]
        row = {"prompt": prompt, "chosen": [assistant(one)], "rejected": [assistant(other)]}
        texts = [
            tokenizer.apply_chat_template([*prompt, assistant(answer)], tokenize=False)
            for answer in (one, other)
        ]
        encoded = encode([("x:1", row)])
        if texts[0] == texts[1]:
            assert [bad.place for bad in encoded.bad] == ["x:1"]
            return
        assert not encoded.bad
        (p, q), (one, other) = encoded.columns["prompt"], [t for t, _ in documents(encoded)]
        assert p == q
        assert one[:p] == other[:p]
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for (tokens, trained), text in zip(documents(encoded), texts, strict=True):
            assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in offsets["offset_mapping"]]
            assert text.startswith(start)
            first = trained.index(1)
            assert all(end <= len(start) for end in ends[:first])
            assert ends[first] > len(start)
            # the tokenizer may write the end of the prompt otherwise before the other answer
            assert p == first or encoded.counts["prompts_differ"]
            assert ends[p] >= len(start.rstrip())

    check()


def test_the_border_may_lie_in_a_token():
    """Merges across the header's end: the token belongs to the answer, in that document only."""
    tokenizer = tokenizer_for("chatml", kind="bpe-across")
    whole = tokenizer("assistant\nuser", add_special_tokens=False)["input_ids"]
    assert len(whole) < 3, "the test needs a token that holds the line break and a word"
    row = {"prompt": [user("q")], "chosen": [assistant("user")], "rejected": [assistant("b")]}
    encoded = encoder(tokenizer=tokenizer)([("x", row)])
    (one, trained), (other, others) = documents(encoded)
    prompt = int(encoded.columns["prompt"][0])
    assert one[:prompt] == other[:prompt]
    assert encoded.counts["straddling"] >= 1
    assert encoded.counts["prompts_differ"] == 1
    text = tokenizer.decode([t for t, on in zip(one, trained, strict=True) if on])
    assert text.endswith("\nuser<|im_end|>")
    text = tokenizer.decode([t for t, on in zip(other, others, strict=True) if on])
    assert text == "b<|im_end|>"


def test_turns_of_tools_within_an_answer_are_not_trained():
    row = {
        "prompt": [user("q")],
        "chosen": [assistant("call"), {"role": "tool", "content": "3"}, assistant("three")],
        "rejected": [assistant("no")],
    }
    tokenizer = byte_tokenizer()
    encoded = encoder(tokenizer=tokenizer)([("x", row)])
    trained = [
        tokenizer.decode([t for t, on in zip(ids, mask, strict=True) if on])
        for ids, mask in documents(encoded)
    ]
    assert trained == ["call<|end|>three<|end|>", "no<|end|>"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_long_prompts_are_cut(mode):
    tokenizer = byte_tokenizer()
    row = {"prompt": "0123456789", "chosen": "yes", "rejected": "no"}
    whole = documents(encoder(tokenizer=tokenizer)([("x", row)]))
    encoded = encoder(tokenizer=tokenizer, max_prompt_length=5, truncation=mode)([("x", row)])
    prompt = [256 + 3, *b"0123456789", 257, 256 + 4]
    kept = prompt[:5] if mode == "keep_start" else prompt[-5:]
    for (tokens, trained), (full, mask) in zip(documents(encoded), whole, strict=True):
        assert tokens == kept + full[len(prompt) :]
        assert trained == [0] * 5 + mask[len(prompt) :]
    assert encoded.counts["prompts_cut"] == 1
    assert encoded.columns["prompt"].tolist() == [5, 5]


def test_thoughts_and_ends():
    tokenizer = byte_tokenizer()
    row = {
        "prompt": "q",
        "chosen": "<think>hm</think>\n\nyes",
        "rejected": "<think>\n\n</think>\n\nno",
    }

    def trained(**rules):
        encoded = encoder(tokenizer=tokenizer, rules=MaskRules(**rules))([("x", row)])
        assert encoded.columns["prompt"].tolist() == [4, 4]
        return [
            tokenizer.decode([t for t, on in zip(ids, mask, strict=True) if on])
            for ids, mask in documents(encoded)
        ]

    assert trained(thinking="drop") == ["yes<|end|>", "no<|end|>"]
    assert trained(thinking="drop", train_end_of_turn=False) == ["yes", "no"]
    assert trained(ignore_empty_think=True) == ["<think>hm</think>\n\nyes<|end|>", "no<|end|>"]


def test_bad_rows_are_listed():
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        ("f:1", good),
        ("f:2", {**good, "rejected": "a"}),
        ("f:3", {"prompt": "q", "chosen": "a"}),
        ("f:4", {**good, "chosen": [assistant("a") | {"train": False}]}),
        ("f:5", good),
    ]
    encoded = encoder()(rows)
    assert encoded.places == ["f:1", "f:1", "f:5", "f:5"]
    assert [bad.place for bad in encoded.bad] == ["f:2", "f:3", "f:4"]
    assert "same text" in encoded.bad[0].message
    assert encoded.bad[0].hint


def test_encoders_are_picklable():
    row = ("x", {"prompt": "q", "chosen": "a", "rejected": "b"})
    for encode in (encoder(), encoder(tokenizer=tokenizer_for("chatml"))):
        again = pickle.loads(pickle.dumps(encode))
        assert documents(again([row])) == documents(encode([row]))


# --- samples


def prepared(folder, rows, factory=DPODataFactory, **more):
    file = folder / f"{abs(hash(json.dumps(rows)))}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = factory.config_type.model_validate(
        {"sources": str(file), "max_length": 32, "cache_dir": folder / "cache", **more}
    )
    return factory(config).build(
        tokenizer=byte_tokenizer(), output_dir=folder, seed=3, world=World(), max_positions=512
    )


def pairs(count):
    return [
        {"prompt": f"p{n}", "chosen": "good" * (n % 4) + str(n), "rejected": "b" * (n % 7) + "!"}
        for n in range(count)
    ]


def segments(samples):
    """Every document of a set: (sample, segment, tokens, labels)."""
    found = []
    for index in range(len(samples)):
        sample = samples[index]
        segment = sample["segment_ids"]
        assert segment.dtype == np.int64
        assert (np.diff(segment) >= 0).all()
        starts = np.flatnonzero(np.diff(segment, prepend=-1))
        assert (sample["position_ids"][starts] == 0).all()
        assert (sample["position_ids"] == 0).sum() == len(starts)
        for start, end in zip(starts, [*starts[1:], len(segment)], strict=True):
            found.append((index, int(segment[start]), sample["input_ids"][start:end].tolist(),
                          sample["labels"][start:end].tolist()))  # fmt: skip
    return found


def as_text(tokens):
    return byte_tokenizer().decode([token for token in tokens if token != -100])


@pytest.mark.parametrize("pack", [True, False])
def test_pairs_stay_together(tmp_path, pack):
    rows = pairs(40)
    data = prepared(tmp_path, rows, pack_samples=pack)
    found = segments(data.train)
    seen = []
    for (sample, first, chosen, labels), (same, second, rejected, others) in zip(
        found[::2], found[1::2], strict=True
    ):
        assert (sample, first % 2, second) == (same, 0, first + 1)
        seen.append((as_text(chosen), as_text(rejected)))
        assert as_text(chosen).endswith(as_text(labels))
        assert as_text(rejected).endswith(as_text(others))
    wanted = [
        tuple(f"<|user|>{r['prompt']}<|end|><|assistant|>{r[name]}<|end|>"
              for name in ("chosen", "rejected")) for r in rows
    ]  # fmt: skip
    assert Counter(seen) == Counter(wanted)
    assert max(data.train.lengths) <= 64
    assert data.train.weights.sum() == 40
    assert data.train.weights.tolist() == [
        len({segment // 2 for s, segment, *_ in found if s == n}) for n in range(len(data.train))
    ]
    assert len(data.train) == 40 if not pack else len(data.train) < 30
    assert data.facts["pairs"] == 40
    assert sum(data.train.sample_id(n).count(".jsonl:") for n in range(len(data.train))) <= 40
    again = pickle.loads(pickle.dumps(data.train))
    assert (again[0]["segment_ids"] == data.train[0]["segment_ids"]).all()


def long(chosen, rejected="no", prompt="p"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("policy", "row", "wanted"),
    [
        ("drop", long("x" * 40), None),
        ("truncate_right", long("x" * 40), ("xxx", "no<|end|>")),
        ("truncate_right", long("x" * 40, "x" * 50), None),  # both become the same
        ("truncate_right", long("x", prompt="p" * 60), None),  # nothing of the answers is left
        ("truncate_left", long("x" * 40), None),  # the prompt would be gone
        ("truncate_left", long("yes", prompt="p" * 60), ("yes<|end|>", "no<|end|>")),
    ],
)
def test_long_pairs(tmp_path, policy, row, wanted):
    data = prepared(tmp_path, [row, long("short")], long_samples=policy, pack_samples=False)
    facts = data.facts
    assert facts["documents"] == 2
    assert facts["long"] == 1
    assert max(len(tokens) for *_, tokens, _ in segments(data.train)) <= 32
    if wanted is None:
        assert len(data.train) == facts["pairs"] == 1
        assert facts["dropped"] == 1
        return
    assert (facts["truncated"], facts["dropped"]) == (1, 0)
    (_, _, chosen, one), (_, _, rejected, other) = segments(data.train)[:2]
    for labels, text in zip((one, other), wanted, strict=True):
        kept = as_text(labels)
        assert kept == text or (policy == "truncate_right" and kept.startswith("xxx"))
    if policy == "truncate_left":
        # the same was cut from both, so their prompts are still one
        assert chosen[: chosen.index(257)] == rejected[: rejected.index(257)]
        assert len(chosen) == 32


def test_too_long_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match=r"1 pairs are longer than 32 tokens.*jsonl:1\) has 45"):
        prepared(tmp_path, [long("x" * 40), long("x")], long_samples="error")


def test_held_out_pairs(tmp_path):
    data = prepared(tmp_path, pairs(20), train_eval_split=[0.75, 0.25])
    assert data.facts["pairs"] == 15
    texts = [
        {as_text(t) for *_, t, _ in segments(s)} for s in (data.train, data.evaluation["eval"])
    ]
    assert data.evaluation["eval"].weights.sum() == 5
    chosen = [{t for t in some if "!" not in t} for some in texts]
    assert not chosen[0] & chosen[1]


def test_judged_answers(tmp_path):
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", "label": n % 3 == 0} for n in range(12)]
    data = prepared(tmp_path, rows, factory=KTODataFactory)
    facts = data.facts
    assert (facts["desirable"], facts["undesirable"], data.train.weights.sum()) == (4, 8, 12)
    for index in range(len(data.train)):
        sample = data.train[index]
        for segment in np.unique(sample["segment_ids"]):
            here = sample["segment_ids"] == segment
            number = int(as_text(sample["labels"][here])[1:].split("<")[0])
            assert set(sample["desirable"][here].tolist()) == {int(number % 3 == 0)}
    batch = data.collate([data.train[0], data.train[len(data.train) - 1]])
    assert batch["desirable"].shape == batch["segment_ids"].shape == batch["labels"].shape
    one_sided = [row for row in rows if row["label"]]
    with pytest.raises(RecipeError, match="4 answers that are all wanted"):
        prepared(tmp_path, one_sided, factory=KTODataFactory)


def test_unpaired_is_one_document():
    row = {"prompt": "q", "completion": "a", "label": False}
    encoded = encoder(UnpairedEncoder)([("x", row)])
    assert encoded.columns["desirable"].tolist() == [0]
    assert len(documents(encoded)) == 1


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"always_max_length": True}, "data.always_max_length"),
        ({"train_on": "all"}, "data.train_on"),
        ({"mask_inputs": False}, "data.mask_inputs"),
        ({"long_samples": "split"}, "data.long_samples"),
        ({"sources": {"name_or_path": "x", "process": False}}, "data.sources.0.process"),
        ({"sources": {"name_or_path": "x", "train_on": "all"}}, "data.sources.0.train_on"),
    ],
)
def test_settings_that_preferences_cannot_have(tmp_path, more, place):
    with pytest.raises(RecipeError, match=place):
        prepared(tmp_path, pairs(2), **more)


def test_every_template_gives_pairs():
    for name in CASES:
        row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
        encoded = encoder(tokenizer=tokenizer_for(name))([("x", row)])
        assert not encoded.bad, name
