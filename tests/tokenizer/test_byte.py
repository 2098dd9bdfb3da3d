"""The byte tokenizer: every byte, any text, and what plain transformers reads back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from arctic_like.registry import lookup
from arctic_like.tokenizer.byte import SPECIAL_TOKENS

CONVERSATION = [
    {"role": "system", "content": " be brief\n"},
    {"role": "user", "content": "ünï  code?"},
    {"role": "assistant", "content": "  yes 🦊\n "},
    {"role": "assistant", "content": "yes"},
    {"role": "tool", "content": "{}"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": ""},
]
RENDERED = (
    "<|system|> be brief\n<|end|><|user|>ünï  code?<|end|><|assistant|>  yes 🦊\n <|end|>"
    "<|assistant|>yes<|end|><|tool|>{}<|end|><|user|><|end|><|assistant|><|end|>"
)


@pytest.fixture(scope="module")
def tokenizer():
    factory = lookup("tokenizer", "byte")
    return factory(factory.config_type(type="byte")).build()


def test_every_code_point_becomes_its_utf8_bytes_and_comes_back(tokenizer):
    # All of Unicode but the surrogates, which are no text.
    for start in range(0, 0x110000, 0x8000):
        text = "".join(chr(c) for c in range(start, start + 0x8000) if not 0xD800 <= c < 0xE000)
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_every_byte_alone_and_every_pair_of_ascii(tokenizer):
    for byte in range(256):
        expected = bytes([byte]).decode(errors="replace")
        assert tokenizer.decode([byte]) == expected
    pairs = [chr(a) + chr(b) for a in range(128) for b in range(128)]
    assert tokenizer.batch_decode(tokenizer(pairs)["input_ids"]) == pairs


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    if not any(token in text for token in SPECIAL_TOKENS):
        assert ids == list(text.encode())


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(256, 262))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)
    assert tokenizer.bos_token_id is None
    assert len(tokenizer) == 262
    assert tokenizer.padding_side == "right"
    assert tokenizer.decode([97, 257, 98], skip_special_tokens=True) == "ab"


def test_template(tokenizer):
    render = tokenizer.apply_chat_template
    assert render(CONVERSATION, tokenize=False) == RENDERED
    assert render(CONVERSATION[:2], tokenize=False, add_generation_prompt=True) == (
        "<|system|> be brief\n<|end|><|user|>ünï  code?<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="no role critic"):
        render([{"role": "critic", "content": ""}], tokenize=False)


def test_generation_marks_cover_each_answer_and_its_end(tokenizer):
    out = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "  yes 🦊\n <|end|>yes<|end|><|end|>"


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2", "qwen3", "mistral"])
def test_plain_transformers_reads_what_was_saved(tokenizer, tmp_path, model_type):
    tokenizer.save_pretrained(tmp_path)
    if model_type:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(chr(c) for c in range(0x2000)) + RENDERED + "  ' s n't  <|pad|>\r\n"
    ids = tokenizer(text)["input_ids"]
    assert again(text)["input_ids"] == ids
    assert again.decode(ids) == text
    assert len(again) == 262
    assert (again.pad_token_id, again.eos_token_id, again.padding_side) == (256, 257, "right")
    assert again.apply_chat_template(CONVERSATION, tokenize=False) == RENDERED
    assert (
        again.apply_chat_template(CONVERSATION)["input_ids"]
        == tokenizer.apply_chat_template(CONVERSATION)["input_ids"]
    )
