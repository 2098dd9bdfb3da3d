"""Rows of every shape, as people have them, and what is said of those that fit none."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.data.base import SourceConfig
from arctic_like.data.shapes import (
    Pair,
    RowError,
    conversation,
    pair,
    text,
    tokens,
    tools,
    unpaired,
)


def config(**more: Any) -> SourceConfig:
    return SourceConfig.model_validate(more)


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def sharegpt(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in pairs]


def context(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**message, "train": False} for message in messages]


ASK = turns(("user", "q"), ("assistant", "a"))
LONG = [*turns(("system", "be")), *ASK, *turns(("user", "r"), ("assistant", "b"))]
MAPPING = {"user": "conversations.from.human", "assistant": "conversations.from.gpt"}
CALL = {"name": "add", "arguments": {"x": 1}}
CALLS = [{"type": "function", "function": CALL}]
ADDED = {"role": "assistant", "tool_calls": CALLS}

CONVERSATIONS: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = [
    ({"messages": ASK}, {}, ASK),
    ({"messages": [{"role": "user", "value": "q"}, {"role": "assistant", "value": "a"}]}, {}, ASK),
    ({"chat": ASK, "messages": 3}, {"column": "chat"}, ASK),
    ({"messages": [{"role": "user", "say": "q"}]}, {"content_key": "say"}, ASK[:1]),
    ({"messages": json.dumps(ASK)}, {}, ASK),  # from a file without lists
    # as `datasets` gives a sequence of structs
    ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, {}, ASK),
    # what a column of one type leaves behind
    ({"messages": [{"role": "user", "content": "q", "name": None, "text": None}]}, {}, ASK[:1]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, {}, ASK[:1]),
    ({"messages": [{**ASK[1], "train": [[0, 1]]}]}, {}, [{**ASK[1], "train": [[0, 1]]}]),
    ({"messages": [{**ASK[1], "weight": 0}]}, {}, [{**ASK[1], "train": False}]),
    ({"messages": [{**ASK[1], "weight": 1.0}]}, {}, [{**ASK[1], "train": True}]),
    ({"messages": [{**ASK[0], "weight": 1.0}]}, {}, ASK[:1]),
    # calls: arguments as a map or as JSON, `function` or not, the list as JSON
    ({"messages": [{**ADDED, "content": None}]}, {}, [ADDED]),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": json.dumps(CALLS)}]}, {}, [ADDED]),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}]}]},
     {}, [{"role": "assistant", "content": "",
           "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]}]),
    # ShareGPT
    ({"conversations": sharegpt(("human", "q"), ("gpt", "a"))}, {}, ASK),
    ({"conversations": sharegpt(("system", "be"), ("human", "q"), ("gpt", "a"), ("Human", "r"),
                                ("gpt", "b"))}, {}, LONG),
    ({"system": "be", "conversations": sharegpt(("human", "q"), ("gpt", "a"))}, {}, LONG[:3]),
    ({"system": "no", "conversations": sharegpt(("system", "be"), ("human", "q"), ("gpt", "a"))},
     {}, LONG[:3]),
    ({"conversations": turns(("human", "q"), ("gpt", "a"))}, {}, ASK),
    ({"conversations": sharegpt(("human", "q"), ("function_call", json.dumps(CALL)),
                                ("observation", "2"), ("gpt", "a"))}, {},
     [ASK[0], ADDED, {"role": "tool", "content": "2"}, ASK[1]]),
    ({"talk": sharegpt(("human", "q"), ("gpt", "a"))}, {"column": "talk"}, ASK),
    # Alpaca
    ({"instruction": "q", "input": "", "output": "a"}, {}, ASK),
    ({"instruction": "q", "input": "1", "output": "a"}, {}, turns(("user", "q\n1"), ("assistant", "a"))),
    ({"instruction": "r", "input": None, "output": "b", "system": "be", "history": [["q", "a"]]},
     {}, LONG),
    # prompt and completion
    ({"prompt": "q", "completion": "a"}, {}, [*context(ASK[:1]), ASK[1]]),
    ({"prompt": ASK, "completion": turns(("assistant", "b"))}, {},
     [*context(ASK), *turns(("assistant", "b"))]),
    ({"prompt": ASK[:1], "completion": "[1]"}, {}, [*context(ASK[:1]), *turns(("assistant", "[1]"))]),
    ({"prompt": "q", "completion": "a", "label": 4}, {}, [*context(ASK[:1]), ASK[1]]),
    ({"prompt": "q", "completion": "a", "label": True}, {"shape": "prompt_completion"},
     [*context(ASK[:1]), ASK[1]]),
    # question and answer
    ({"user": "q", "assistant": "a"}, {}, ASK),
    ({"query": "q", "response": "a", "id": 1}, {"shape": "question_answer"}, ASK),
    ({"ask": "q", "say": "a"}, {"role_mapping": {"user": "ask", "assistant": "say"}}, ASK),
    ({"s": "be", "q": "q", "a": "a"},
     {"role_mapping": {"user": "q", "assistant": "a", "system": "s"}}, LONG[:3]),
    ({"s": None, "q": "q", "a": "a"},
     {"role_mapping": {"system": "s", "user": "q", "assistant": "a"}}, ASK),
    ({"deep": {"q": "q"}, "a": "a"}, {"role_mapping": {"user": "deep.q", "assistant": "a"}}, ASK),
    ({"conversations": sharegpt(("system", "be"), ("human", "q"), ("gpt", "a"), ("gpt", "b"),
                                ("human", "r"), ("gpt", "c"))},
     {"role_mapping": MAPPING},
     turns(("system", "be"), ("user", "q"), ("assistant", "a"), ("assistant", "b"), ("user", "r"),
           ("assistant", "c"))),
    ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, {"role_mapping": MAPPING}, ASK),
    ({"turns": [{"who": "q", "content": "q"}, {"who": "a", "tool_calls": CALLS, "train": False}]},
     {"role_mapping": {"user": "turns.who.q", "assistant": "turns.who.a"}},
     [ASK[0], {**ADDED, "train": False}]),
    # templates
    ({"title": "T", "n": 2, "say": "a\n"},
     {"role_mapping": {"user": "{{ title }}: {{ n + 1 }}\n", "assistant": "{{ say }}"}},
     turns(("user", "T: 3\n"), ("assistant", "a\n"))),
    ({"q": "<a & 'ä'>", "a": {"x": "<ä>"}},
     {"role_mapping": {"user": "{{ q }}", "assistant": "{{ a | tojson }}"}},
     turns(("user", "<a & 'ä'>"), ("assistant", '{"x": "<ä>"}'))),
]  # fmt: skip


@pytest.mark.parametrize(("row", "more", "messages"), CONVERSATIONS)
def test_conversations(
    row: dict[str, Any], more: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    before = json.dumps(row)
    assert conversation(row, config(**more)) == messages
    assert json.dumps(row) == before, "the row itself was changed"


BROKEN: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"talk": ASK}, {}, r"has the columns 'talk'; expected is `messages`, .*`user` and `assistant`",
     "column.*role_mapping.*docs/data.md"),
    ({"messages": []}, {}, "is an empty conversation", ""),
    ({"messages": None}, {}, "has null in 'messages'; expected is a list", ""),
    ({"messages": "hi"}, {}, "has 'hi' in 'messages'", ""),
    ({"messages": {"role": ["user"], "content": []}}, {}, "has a map in 'messages'", ""),
    ({"messages": {"role": [], "content": []}}, {}, "is an empty conversation", ""),
    ({"messages": '[{"role"'}, {}, "has no whole JSON in 'messages'", ""),
    ({"messages": [ASK[0], None]}, {}, "has null as entry 2 of 'messages'", ""),
    ({"messages": turns(("user", None))}, {}, "has null as the content of message 1", ""),
    ({"messages": turns(("user", ["x"]))}, {}, "has a list as the content of message 1", ""),
    ({"messages": turns(("user", [{"type": "image"}]))}, {}, "has a part of type 'image' in message 1", ""),
    ({"messages": turns(("human", "x"))}, {}, "has the role 'human' in message 1", "role_mapping"),
    ({"messages": [{"content": "x"}]}, {}, "has the role null in message 1", ""),
    ({"messages": [{"role": "user"}]}, {}, r"has no 'content' / .* in message 1, only 'role'", "content_key"),
    ({"messages": [{**ASK[1], "train": 1}]}, {}, "has 1 as `train`", ""),
    ({"messages": [{**ASK[1], "train": [[0, 2]]}]}, {},
     r"has \[0, 2\] in `train` of message 1; .* 1 char", ""),
    ({"messages": [{**ASK[1], "train": [0, 1]}]}, {}, "has 0 in `train`", ""),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, {},
     "has a call without a function's name in message 1", ""),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{x"}}]}]}, {}, "has arguments that are no JSON", ""),
    ({"conversations": sharegpt(("function_call", "add(1)"))}, {},
     "has 'add.1.' in the call of message 1", ""),
    ({"conversations": sharegpt(("narrator", "x"))}, {}, "has the role 'narrator'", ""),
    ({"instruction": "q", "output": None}, {}, "has null as the content of message 2", ""),
    ({"instruction": "q", "output": "a", "history": ["x"]}, {}, "has 'x' as turn 1 of 'history'", ""),
    ({"instruction": "q"}, {"shape": "alpaca"}, "has no 'output'; its columns are 'instruction'", ""),
    ({"prompt": None, "completion": "a"}, {}, "has null in 'prompt'", ""),
    ({"prompt": "q", "completion": "a", "label": False}, {},
     "has `prompt`, `completion` and a `label`", "kto"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, "is a preference", "type: dpo"),
    ({"input_ids": [1]}, {}, "is tokenised already", "process: false"),
    ({"text": "x"}, {}, "has a `text`, which is no conversation", "type: causal"),
    ({"text": "x"}, {"shape": "text"}, "is read as `shape: text`", "type: causal"),
    ({"context": "x", "question": "q", "answer": "a"}, {}, "has the columns 'context'", ""),
    ({"q": "x"}, {"role_mapping": {"user": "q", "assistant": "a"}}, "has no 'a'; its columns are 'q'", ""),
    ({"q": "x", "a": None}, {"role_mapping": {"user": "q", "assistant": "a"}},
     "has null as the content of message 2", ""),
    ({"c": sharegpt(("bing", "x"))}, {"role_mapping": {"user": "c.from.human"}},
     r"has from 'bing' in turn 1 of 'c'; role_mapping knows 'human'", ""),
    ({"q": "x"}, {"role_mapping": {"user": "{{ quest }}", "assistant": "q"}},
     "does not fill the template '{{ quest }}': 'quest' is undefined; its columns are 'q'", ""),
    ({"q": "x"}, {"role_mapping": {"user": "{{ q.__class__.__mro__ }}", "assistant": "q"}},
     "does not fill the template", ""),
    ({"q": "x"}, {"role_mapping": {"user": "{{ 1 / 0 }}", "assistant": "q"}}, "division by zero", ""),
]  # fmt: skip


@pytest.mark.parametrize(("row", "more", "message", "hint"), BROKEN)
def test_broken_conversations(
    row: dict[str, Any], more: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(RowError, match=message) as caught:
        conversation(row, config(**more))
    assert re.search(hint, caught.value.hint), caught.value.hint


def test_texts() -> None:
    assert text({"text": "x", "id": 1}, config()) == "x"
    assert text({"body": "x"}, config()) == "x"
    assert text({"a": {"b": "x"}, "c": 1}, config(column="a.b")) == "x"
    assert text({"a": "x", "b": 2}, config(column="{{ a }}-{{ b }}")) == "x-2"
    row: dict[str, Any]
    more: dict[str, Any]
    for row, more, message, hint in (
        ({"a": "x", "b": "y"}, {}, "has the columns 'a', 'b'; expected is `text`", "column"),
        ({"text": None}, {}, "has null in 'text'", ""),
        ({"text": "x"}, {"column": "body"}, "has no 'body'", ""),
        ({"messages": ASK}, {}, "has a list in 'messages'", "type: sft"),
        ({"messages": ASK, "id": 1}, {}, "expected is `text`", "type: sft"),
        ({"prompt": "x", "chosen": "x", "rejected": "y"}, {}, "expected is `text`", "type: dpo"),
        ({"text": "x"}, {"shape": "messages"}, "is read as `shape: messages`", "type: sft"),
    ):
        with pytest.raises(RowError, match=message) as caught:
            text(row, config(**more))
        assert hint in caught.value.hint


def test_tokens() -> None:
    assert tokens({"input_ids": [1, 2]}) == ([1, 2], [True, True])
    assert tokens({"input_ids": [1, 2], "labels": [-100, 2]}) == ([1, 2], [False, True])
    for row, message in (
        ({"ids": [1]}, "has no 'input_ids'"),
        ({"input_ids": "1"}, "has no list of whole numbers"),
        ({"input_ids": [1], "labels": [1, 2]}, "not as many"),
        ({"input_ids": [1], "labels": [2]}, "has the label 2 at the token 1"),
    ):
        with pytest.raises(RowError, match=message):
            tokens(row)


def test_tools() -> None:
    listed = [{"type": "function", "function": {"name": "add"}}]
    assert tools({"tools": listed}) == listed
    assert tools({"tools": json.dumps(listed)}) == listed
    for nothing in ({}, {"tools": None}, {"tools": []}, {"tools": " "}, {"tools": "[]"}):
        assert tools(nothing) is None
    for value in ("add", 3, ["add"], '["add"]', "[{"):
        with pytest.raises(RowError, match="'tools'"):
            tools({"tools": value})


A, B = turns(("assistant", "a")), turns(("assistant", "b"))
Q = ASK[:1]
HH = "\n\nHuman: hi\n\nAssistant: well?\n\nHuman: q\n\nAssistant: The {}"

PAIRS: list[tuple[dict[str, Any], dict[str, Any], Pair]] = [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {}, Pair(Q, A, B)),
    ({"prompt": Q, "chosen": A, "rejected": B}, {}, Pair(Q, A, B)),
    ({"prompt": LONG[:4], "chosen": A[0], "rejected": "b"}, {}, Pair(LONG[:4], A, B)),
    ({"chosen": Q + A, "rejected": Q + B}, {}, Pair(Q, A, B)),
    ({"chosen": LONG[:4] + A, "rejected": LONG[:4] + B}, {}, Pair(LONG[:4], A, B)),
    # as in ultrafeedback_binarized: the prompt as text, and whole conversations
    ({"prompt": "q", "chosen": Q + A, "rejected": Q + B, "messages": Q + A}, {}, Pair(Q, A, B)),
    ({"prompt": " q\n", "chosen": Q + A, "rejected": Q + B}, {}, Pair(Q, A, B)),
    # answers of several turns, of unlike length
    ({"chosen": LONG, "rejected": LONG[:3]}, {}, Pair(LONG[:2], LONG[2:], LONG[2:3])),
    # equal answers stay answers
    ({"chosen": Q + A, "rejected": Q + A}, {}, Pair(Q, A, A)),
    # a call of both, then other results: the answer begins with the call
    ({"chosen": [*Q, ADDED, *turns(("tool", "2")), *A],
      "rejected": [*Q, ADDED, *turns(("tool", "3")), *B]}, {},
     Pair(Q, [ADDED, *turns(("tool", "2")), *A], [ADDED, *turns(("tool", "3")), *B])),
    # texts
    ({"chosen": HH.format("cat"), "rejected": HH.format("dog")}, {},
     Pair(turns(("user", "hi"), ("assistant", "well?"), ("user", "q")),
          turns(("assistant", "The cat")), turns(("assistant", "The dog")))),
    ({"chosen": "What? \n\nThe cat", "rejected": "What? \nThe dog"}, {},
     Pair(turns(("user", "What?")), turns(("assistant", "The cat")), turns(("assistant", "The dog")))),
    ({"chosen": "Say it. I said a", "rejected": "Say it. I said b"}, {},
     Pair(turns(("user", "Say it.")), turns(("assistant", "I said a")), turns(("assistant", "I said b")))),
    ({"chosen": "q a", "rejected": "q\nb"}, {}, Pair(Q, A, B)),
    ({"chosen": "2 + 2 = four", "rejected": "2 + 2 = five"}, {},
     Pair(turns(("user", "2 + 2 =")), turns(("assistant", "four")), turns(("assistant", "five")))),
    # by other names
    ({"s": "be", "question": "q", "good": "a", "bad": "b"},
     {"role_mapping": {"system": "s", "prompt": "question", "chosen": "good", "rejected": "bad"}},
     Pair([*turns(("system", "be")), *Q], A, B)),
    ({"question": "q", "chosen": "a", "rejected": "b"}, {"role_mapping": {"user": "{{ question }}"}},
     Pair(Q, A, B)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "more", "expected"), PAIRS)
def test_pairs(row: dict[str, Any], more: dict[str, Any], expected: Pair) -> None:
    assert pair(row, config(**more)) == expected


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        ({"messages": ASK}, r"has the columns 'messages'; expected is `prompt`, `chosen`, `rejected`", ""),
        ({"prompt": "q", "completion": "a", "label": True}, "expected is `prompt`, `chosen`", "type: kto"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "has null in 'chosen'", ""),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "has no answer in 'chosen'", ""),
        ({"prompt": "q", "chosen": A, "rejected": turns(("assistant", None))}, "null as the content", ""),
        ({"chosen": A, "rejected": B}, "has no 'prompt', and answers alone", "prompt"),
        ({"chosen": "cat", "rejected": "dog"}, "begin differently, and no 'prompt'", "role_mapping"),
        ({"chosen": "cats", "rejected": "cat"}, "begin differently, and no 'prompt'", ""),
        ({"chosen": Q + A, "rejected": turns(("user", "x")) + B},
         "differ at message 1, which is the user's", ""),
        ({"chosen": Q + A + Q, "rejected": Q + B},
         "has an answer in 'chosen' that ends with a turn of the user", ""),
        ({"prompt": "other", "chosen": Q + A, "rejected": Q + B}, "has a 'prompt' that is not among", ""),
    ],
)  # fmt: skip
def test_broken_pairs(row: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        pair(row, config())
    assert hint in caught.value.hint


words = st.text(alphabet="ab .\n", max_size=12)


def attempt(read: Any, row: dict[str, Any]) -> tuple[Any, str]:
    """(what is read, "") or (None, what is said)."""
    try:
        return read(row, config()) if read not in (tokens, tools) else read(row), ""
    except RowError as error:
        return None, str(error)


@given(prompt=words, chosen=words, rejected=words)
@settings(max_examples=200, deadline=None)
def test_an_implied_prompt_loses_no_character(prompt: str, chosen: str, rejected: str) -> None:
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    found, said = attempt(pair, row)
    if found is None:
        # only where there is no white space between text that both have and text after it
        assert "begin differently" in said
        return
    for name, answer in (("chosen", found.chosen), ("rejected", found.rejected)):
        whole = found.prompt[0]["content"] + answer[0]["content"]
        assert "".join(whole.split()) == "".join(row[name].split())
        assert found.prompt[0]["content"].strip()
        assert answer[0]["content"].strip()
        assert row[name].lstrip().startswith(found.prompt[0]["content"])


def test_unpaired() -> None:
    for row in (
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": Q, "completion": A, "label": 1},
        {"completion": Q + A, "label": True},
        {"messages": Q + A, "label": True},
    ):
        found = unpaired(row, config())
        assert found.messages == [*context(Q), *A]
        assert found.label is True
    assert unpaired({"prompt": "q", "completion": "a", "label": 0}, config()).label is False
    mapping = {"prompt": "x", "completion": "y", "label": "good"}
    mapped = unpaired({"x": "q", "y": "a", "good": False}, config(role_mapping=mapping))
    assert mapped.messages == [*context(Q), *A]
    row_: dict[str, Any]
    for row_, message, hint in (
        ({"prompt": "q", "completion": "a"}, "expected is `prompt`, `completion`, `label`", ""),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "expected is", "type: dpo"),
        ({"prompt": "q", "completion": "a", "label": "yes"}, "has 'yes' in 'label'", ""),
        ({"prompt": "q", "completion": "a", "label": None}, "has null in 'label'", ""),
        ({"completion": A, "label": True}, "has no prompt", ""),
        ({"completion": Q, "label": True}, "has no answer in 'completion'", ""),
    ):
        with pytest.raises(RowError, match=message) as caught:
            unpaired(row_, config())
        assert hint in caught.value.hint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "train", "tool_calls", "function"]),
        inner, max_size=4,
    ),
    max_leaves=10,
)  # fmt: skip
columns = st.dictionaries(
    st.sampled_from([
        "messages", "conversations", "prompt", "completion", "instruction", "output", "history",
        "chosen", "rejected", "label", "text", "tools", "input_ids", "labels", "user", "assistant",
    ]),
    json_values, max_size=5,
)  # fmt: skip


@given(row=columns)
@settings(max_examples=400, deadline=None)
def test_whatever_a_row_holds_it_fits_or_is_refused(row: dict[str, Any]) -> None:
    for read in (conversation, text, pair, unpaired, tokens, tools):
        found, said = attempt(read, row)
        assert found is None or not said
        assert len(said) < 1000
