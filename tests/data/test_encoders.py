"""Encoders: options end to end, rows that cannot be used, rendering as transformers renders."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.base import SourceConfig
from arctic_like.data.encoders import ConversationEncoder, DocumentEncoder, MaskRules, TokenEncoder
from arctic_like.data.factory import SFTDataFactory
from arctic_like.data.rendering import Renderer
from arctic_like.data.thinking import without_thoughts
from arctic_like.errors import RecipeError
from arctic_like.tokenizer.byte import byte_tokenizer
from tests.data.chat_templates import CASES
from tests.data.test_masks import conversation, given_tools
from tests.data.tokenizers_for_tests import tokenizer_for

USER = {"role": "user", "content": "q"}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def trained(rows, *, tokenizer=None, source=None, **rules):
    """What of each row is trained, as text, and the rest of the encoder's answer."""
    tokenizer = tokenizer or byte_tokenizer()
    encode = ConversationEncoder(tokenizer, source or SourceConfig(), MaskRules(**rules))
    encoded = encode([(f"f:{n}", row) for n, row in enumerate(rows, 1)])
    ends = np.cumsum(encoded.lengths)
    texts = [
        tokenizer.decode(encoded.tokens[a:b][encoded.trained[a:b].astype(bool)])
        for a, b in zip(ends - encoded.lengths, ends, strict=True)
    ]
    return texts, encoded


@pytest.mark.parametrize("name", [name for name in CASES if "strftime" not in CASES[name].template])
def test_text_is_what_transformers_renders(name):
    tokenizer = tokenizer_for(name)
    render = Renderer(tokenizer)

    @given(conversation(name), given_tools(name), st.booleans())
    def check(messages, tools, generation):
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation
        )
        assert render(messages, tools=tools, generation=generation) == theirs

    check()


def test_the_date_is_always_the_same():
    text = Renderer(tokenizer_for("llama31"))([USER])
    assert "Today Date: 26 Jul 2024" in text


def test_what_is_no_plain_value_reaches_no_template():
    import datetime

    tokenizer = tokenizer_for("chatml")
    said = {"role": "user", "content": "q", "at": datetime.date(2024, 1, 1), "n": np.int64(3)}
    assert Renderer(tokenizer)([said]) == Renderer(tokenizer)([USER])


TALK = [USER, assistant("one"), USER, assistant("two")]


@pytest.mark.parametrize(
    ("rules", "wanted"),
    [
        ({}, "one<|end|>two<|end|>"),
        ({"train_on": "last_assistant"}, "two<|end|>"),
        ({"train_end_of_turn": False}, "onetwo"),
        ({"train_on": "last_assistant", "train_end_of_turn": False}, "two"),
        (
            {"train_on": "all"},
            "<|user|>q<|end|><|assistant|>one<|end|><|user|>q<|end|><|assistant|>two<|end|>",
        ),
        (
            {"train_on": "all", "train_end_of_turn": False},
            "<|user|>q<|end|><|assistant|>one<|user|>q<|end|><|assistant|>two",
        ),
    ],
)
def test_rules(rules, wanted):
    assert trained([{"messages": TALK}], **rules)[0] == [wanted]


def test_messages_go_before_the_rules():
    messages = [{**USER, "train": True}, assistant("one", train=False), USER, assistant("two")]
    assert trained([{"messages": messages}])[0] == ["q<|end|>two<|end|>"]
    assert trained([{"messages": messages}], train_on="last_assistant")[0] == ["q<|end|>two<|end|>"]
    whole = "<|user|>q<|end|><|assistant|><|user|>q<|end|><|assistant|>two<|end|>"
    assert trained([{"messages": messages}], train_on="all")[0] == [whole]


def test_a_prompt_is_context_by_its_shape_only():
    """`train_on: all` trains the prompt of a prompt and completion too."""
    row = {"prompt": "q", "completion": "a"}
    assert trained([row])[0] == ["a<|end|>"]
    assert trained([row], train_on="all")[0] == ["<|user|>q<|end|><|assistant|>a<|end|>"]


def test_stretches_and_ends():
    def of(*stretches, **rules):
        row = {"messages": [USER, assistant("0123456789", train=[list(s) for s in stretches])]}
        return trained([row], **rules)[0][0]

    assert of((0, 3), (5, 7)) == "01256"
    assert of((5, 10)) == "56789<|end|>"
    assert of((5, 10), train_end_of_turn=False) == "56789"


def test_thoughts_go():
    row = {
        "messages": [
            USER,
            assistant("<think>\nhm\n</think>\n\nyes <think>again</think> sir", train=[[22, 30]]),
            {**USER, "content": "<think>mine</think>"},
            assistant("no", reasoning_content="why"),
        ]
    }
    assert row["messages"][1]["content"][22:30] == "es <thin"
    texts, encoded = trained([row], thinking="drop")
    assert texts == ["es no<|end|>"]
    written = byte_tokenizer().decode(encoded.tokens)
    assert "yes sir<|end|>" in written
    assert "<think>mine</think>" in written
    assert "why" not in written


def test_thoughts_under_a_key_reach_the_template():
    tokenizer = tokenizer_for("qwen3")
    row = {"messages": [USER, assistant("a", thinking="why")]}
    assert trained([row], tokenizer=tokenizer)[0] == ["<think>\nwhy\n</think>\n\na<|im_end|>"]
    texts, _ = trained([row], tokenizer=tokenizer, thinking="drop", ignore_empty_think=True)
    assert texts == ["a<|im_end|>"]


@given(st.lists(st.sampled_from(["a", "b", " ", "<think>x</think>\n", "</think>"]), max_size=6))
def test_stretches_move_with_their_characters(parts):
    text = "".join(parts)
    for at in range(len(text)):
        (moved,) = without_thoughts([assistant(text, train=[[at, at + 1]])])
        start, stop = moved["train"][0]
        assert 0 <= start <= stop <= len(moved["content"])
        assert moved["content"][start:stop] in ("", text[at])
    (whole,) = without_thoughts([assistant(text, train=[[n, n + 1] for n in range(len(text))])])
    kept = [whole["content"][start:stop] for start, stop in whole["train"]]
    assert "".join(kept) == whole["content"]


def test_bad_rows_are_listed_and_nothing_else_is_lost():
    good = {"messages": TALK}
    rows = [good, {"messages": []}, {"x": 1}, good, {"messages": [{"role": "king", "content": ""}]}]
    texts, encoded = trained(rows)
    assert (len(texts), encoded.places) == (2, ["f:1", "f:4"])
    assert [bad.place for bad in encoded.bad] == ["f:2", "f:3", "f:5"]
    assert all(bad.message for bad in encoded.bad)
    none = trained([{"x": 1}])[1]
    assert (none.places, len(none.tokens), len(none.bad)) == ([], 0, 1)


def test_the_sample_in_a_message_is_short():
    tokenizer = tokenizer_for("chatml")
    tokenizer = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    _, encoded = trained([{"messages": [USER, assistant("long " * 999)]}], tokenizer=tokenizer)
    (bad,) = encoded.bad
    assert "cannot be masked exactly" in bad.message
    assert len(bad.message) < 500
    assert "generation" in bad.hint


def test_texts_and_tokens_list_bad_rows():
    encoded = DocumentEncoder(byte_tokenizer(), SourceConfig())([("a", {"text": "x"}), ("b", {})])
    assert encoded.places == ["a"]
    assert [bad.place for bad in encoded.bad] == ["b"]
    rows = [("a", {"input_ids": [1, 2]}), ("b", {"input_ids": [1, 999]}), ("c", {"input_ids": "x"})]
    encoded = TokenEncoder(262)(rows)
    assert encoded.places == ["a"]
    assert [bad.place for bad in encoded.bad] == ["b", "c"]
    assert "999" in encoded.bad[0].message


@pytest.mark.parametrize("name", ["chatml", "qwen3", "marked"])
def test_picklable_and_the_same_in_any_process(name):
    encode = ConversationEncoder(tokenizer_for(name), SourceConfig(), MaskRules())
    rows = [("a", {"messages": TALK}), ("b", {"messages": [USER, assistant("<think>x</think>y")]})]
    first = encode(rows)
    again = pickle.loads(pickle.dumps(encode))(rows)
    for key in ("tokens", "trained", "lengths"):
        assert (getattr(first, key) == getattr(again, key)).all()


def test_a_sources_own_rule_goes_before():
    config = SFTDataFactory.config_type.model_validate({"sources": [{"name_or_path": "x"}]})
    source = SourceConfig(name_or_path="x", train_on="all")
    assert MaskRules.of(config, source).train_on == "all"
    assert MaskRules.of(config, config.sources[0]).train_on == "assistant"
    factory = SFTDataFactory(config)
    assert factory.shape(source) != factory.shape(config.sources[0])


def test_a_broken_template_is_said_at_once():
    tokenizer = pickle.loads(pickle.dumps(tokenizer_for("chatml")))
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }"
    with pytest.raises(RecipeError, match=r"chat_template: is broken at its line 2"):
        Renderer(tokenizer)
