"""Tokens as text: whole characters, exactly what is trained, for several kinds of tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_like.data.decoding import Span, TokenText
from arctic_like.tokenizer.byte import byte_tokenizer
from tests.data.tokenizers_for_tests import tokenizer_for

TEXTS = st.text(st.sampled_from("ab e\n\t éß你好🙂\u0301…"), max_size=40)


@pytest.mark.parametrize("kind", ["byte", "bpe", "bpe-across", "metaspace"])
@given(text=TEXTS, other=TEXTS)
def test_the_spans_say_what_the_tokenizer_says(kind, text, other):
    tokenizer = tokenizer_for("chatml", kind=kind)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    more = tokenizer(other, add_special_tokens=False)["input_ids"]
    shown = TokenText(tokenizer)
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(span.text for span in shown.spans(tokens, [False] * len(tokens))) == whole
    # a border between trained and not is a border between spans, and moves no character
    spans = shown.spans(tokens + more, [False] * len(tokens) + [True] * len(more))
    together = tokenizer.decode(tokens + more, clean_up_tokenization_spaces=False)
    assert "".join(span.text for span in spans) == together
    assert "".join(span.text for span in spans if not span.trained) == together[: len(whole)]
    assert len(spans) <= 2


def test_special_tokens_stand_for_themselves_and_characters_of_bytes_are_whole():
    tokenizer = byte_tokenizer()
    tokens = tokenizer("<|user|>é🧊<|end|>")["input_ids"]
    assert len(tokens) == 1 + 2 + 4 + 1
    assert TokenText(tokenizer).spans(tokens, [False] * 7 + [True]) == [
        Span("<|user|>", False, special=True),
        Span("é🧊", False),
        Span("<|end|>", True, special=True),
    ]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bytes_that_are_no_character_are_shown_as_such_and_do_not_hold_up_the_rest(count):
    text = "".join(span.text for span in TokenText(byte_tokenizer()).spans(
        [0xFF] * count + [ord("a")], [False] * (count + 1)))  # fmt: skip
    assert text.endswith("a")
    assert text.count("\ufffd") == count


def test_a_border_inside_a_character_keeps_both_sides():
    tokens = list("é".encode())
    spans = TokenText(byte_tokenizer()).spans([*tokens, ord("x")], [False, True, True])
    assert spans == [Span("\ufffd", False), Span("\ufffdx", True)]
