"""Exactly what the assistant wrote is trained: against hand-written oracles of real templates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.data.masks import TextEncoder, token_mask
from arctic_like.data.shapes import RowError
from arctic_like.data.templates import ChatTemplate
from arctic_like.errors import RecipeError
from tests.data.chat_templates import CASES, QWEN3
from tests.data.tokenizers_for_tests import token_bytes, tokenizer_for

# pieces that tempt: text of headers and prompts, borders of white space, thinking, private characters
PIECES = [
    "a", "b c", "hello", "assistant", "assistant\n", "user\n", " ", "  ", "\n", "\n\n", "\t", "Größe",
    "你好", "🙂", "42", "<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "</s>", "<end_of_turn>",
    "<think>", "</think>", "<think>\n\n</think>\n\n", "<think>\nwhy\n</think>\n\nso", "\U000f0000",
    "<|eot_id|>", "<|end|>", "{{ x }}", "{% generation %}",
]  # fmt: skip
content = st.lists(st.sampled_from(PIECES), min_size=0, max_size=4).map("".join)


@st.composite
def conversation(draw, *, alternates: bool, system: bool):
    messages = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    count = draw(st.integers(1, 6))
    for turn in range(count):
        free = not alternates and turn > 0
        role = (
            draw(st.sampled_from(["user", "assistant"]))
            if free
            else ["user", "assistant"][turn % 2]
        )
        messages.append({"role": role, "content": draw(content)})
    said = [m["content"] for m in messages]
    if draw(st.booleans()):  # an answer that repeats the prompt
        messages[-1]["content"] = draw(st.sampled_from(said))
    return messages


def expected(name, messages):
    parts = CASES[name].oracle(messages)
    text = "".join(part for part, _ in parts)
    return text, np.concatenate([np.full(len(part), on) for part, on in parts]).astype(bool)


def characters(rendered):
    mask = np.zeros(len(rendered.text), dtype=bool)
    for start, end in rendered.spans:
        mask[start:end] = True
    return mask


@pytest.mark.parametrize("name", CASES)
def test_characters(name):
    case = CASES[name]
    template = ChatTemplate(tokenizer_for(name))

    @settings(max_examples=60, deadline=None)
    @given(conversation(alternates=case.alternates, system=case.system))
    def check(messages):
        rendered = template.trained(messages)
        text, mask = expected(name, messages)
        assert rendered.text == text
        assert (characters(rendered) == mask).all(), (messages, rendered)

    check()


@pytest.mark.parametrize("kind", ["byte", "bpe", "bpe-across"])
@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", ["chatml", "mistral", "qwen3"])
def test_tokens(name, kind, trim_offsets):
    """A token is trained when it holds any byte of what the assistant wrote; positions are counted
    from the bytes of the vocabulary, not from the tokenizer's offsets."""
    case = CASES[name]
    tokenizer = tokenizer_for(name, kind=kind, trim_offsets=trim_offsets)
    template, encode = ChatTemplate(tokenizer), TextEncoder(tokenizer)

    @settings(max_examples=25, deadline=None)
    @given(conversation(alternates=case.alternates, system=case.system))
    def check(messages):
        rendered = template.trained(messages)
        (encoding,) = encode([rendered.text], add_special_tokens=False)
        text, mask = expected(name, messages)
        per_byte = np.repeat(mask, [len(c.encode()) for c in text])
        pieces = [token_bytes(tokenizer, token) for token in encoding.ids]
        assert b"".join(pieces) == text.encode()
        ends = np.cumsum([len(piece) for piece in pieces])
        starts = ends - [len(piece) for piece in pieces]
        # a character whose bytes lie in several tokens belongs to each of them
        wanted = [per_byte[a:b].any() for a, b in zip(starts, ends, strict=True)]
        assert token_mask(encoding, rendered.spans).trained.tolist() == wanted

    check()


def test_encoding_is_the_tokenizers_own():
    tokenizer = tokenizer_for("qwen3")
    texts = ["a  b\n", "<|im_start|>user\nx<|im_end|>", "你好 🙂", ""]
    encodings = TextEncoder(tokenizer)(texts, add_special_tokens=False)
    assert [e.ids for e in encodings] == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_encoder_survives_the_users_truncation():
    tokenizer = tokenizer_for("chatml")
    tokenizer("warm", truncation=True, max_length=2, padding="max_length")
    (encoding,) = TextEncoder(tokenizer)(["a b c d e f"], add_special_tokens=False)
    assert len(encoding.ids) > 2


def test_generation_marks_agree_with_transformers():
    tokenizer = tokenizer_for("marked")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": " there "},
        {"role": "assistant", "content": "hi"},
    ]
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    rendered = ChatTemplate(tokenizer).trained(messages)
    (encoding,) = TextEncoder(tokenizer)([rendered.text], add_special_tokens=False)
    assert encoding.ids == theirs["input_ids"]
    assert token_mask(encoding, rendered.spans).trained.tolist() == theirs["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "marked", "qwen3"])
def test_untrained_turns(name):
    """`train: false` leaves a turn out and changes nothing else."""
    template = ChatTemplate(tokenizer_for(name))
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one", "train": False},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "two"},
    ]
    full = template.trained([{k: v for k, v in m.items() if k != "train"} for m in messages])
    part = template.trained(messages)
    assert part.text == full.text
    assert part.spans == full.spans[1:]


def with_template(template: str, name: str = "chatml"):
    import copy

    tokenizer = copy.deepcopy(tokenizer_for(name))
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


TALK = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "b"},
]


def test_no_end_token_is_counted():
    template = with_template(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    rendered = template.trained(TALK)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a", "b"]
    assert rendered.endless == 2


@pytest.mark.parametrize(
    "template",
    [
        # writes an answer twice
        "{% for m in messages %}{{ m.content }}<|im_end|>{{ m.content }}{% endfor %}",
        # its generation prompt is not how turns begin
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>ANSWER {% endif %}",
        # middle turns end otherwise than last ones
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        # what a turn says is found by counting its characters
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:1] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
)
def test_refused_where_it_cannot_be_exact(template):
    with pytest.raises(RowError, match=r"cannot be masked exactly.*The sample: "):
        with_template(template).trained(TALK)


def test_no_template():
    import copy

    tokenizer = copy.deepcopy(tokenizer_for("chatml"))
    tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        ChatTemplate(tokenizer)


def test_template_that_refuses():
    template = ChatTemplate(tokenizer_for("gemma"))
    with pytest.raises(RowError, match="System role not supported"):
        template.trained([{"role": "system", "content": "x"}, *TALK])


def test_thinking_of_earlier_turns_goes():
    """Qwen 3 drops the thoughts of turns before the last question; what is left is trained."""
    template = with_template(QWEN3)
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\none"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
    ]
    rendered = template.trained(messages)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "one<|im_end|>",
        "<think>\nhm\n</think>\n\ntwo<|im_end|>",
    ]


def test_tool_calls():
    """Calls that a template writes behind the content belong to the turn, up to its end token."""
    template = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}<call>{{ call.name }}</call>{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    rendered = template.trained(messages)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "<call>f</call><|im_end|>",
        "three<|im_end|>",
    ]
