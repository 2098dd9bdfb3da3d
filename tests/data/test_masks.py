"""Exactly what the assistant wrote is trained: against hand-written oracles of real templates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from arctic_like.data.masks import TextEncoder, token_mask
from arctic_like.data.shapes import RowError
from arctic_like.data.templates import ChatTemplate
from arctic_like.errors import RecipeError
from tests.data.chat_templates import CASES, QWEN3
from tests.data.tokenizers_for_tests import KINDS, held, tokenizer_for

# pieces that tempt: text of headers and prompts, borders of white space, thinking, private characters
PIECES = [
    "a", "b c", "hello", "assistant", "assistant\n", "user\n", " ", "  ", "\n", "\n\n", "\t", "Größe",
    "你好", "🙂", "42", "<|im_end|>", "<|im_start|>assistant\n", "[/INST]", "</s>", "<end_of_turn>",
    "<think>", "</think>", "<think>\n\n</think>\n\n", "<think>\nwhy\n</think>\n\nso", "\U000f0000",
    "<|eot_id|>", "<|end|>", "{{ x }}", "{% generation %}",
]  # fmt: skip
content = st.lists(st.sampled_from(PIECES), min_size=0, max_size=4).map("".join)
arguments = st.dictionaries(
    st.sampled_from(["city", "n", "a b"]),
    content | st.integers() | st.lists(content, max_size=2) | st.none(),
    max_size=2,
)
TOOL = {"type": "function", "function": {"name": "f", "description": "Größe <b>", "parameters": {}}}


def ask(name):
    return st.builds(lambda text: [{"role": "user", "content": text}], content)


@st.composite
def answer(draw, name):
    message = {"role": "assistant", "content": draw(content)}
    if CASES[name].thoughts and draw(st.booleans()):
        message["reasoning_content"] = draw(content)
    return [message]


@st.composite
def errand(draw, name):
    """Calls of tools, what they gave, and an answer."""
    many = draw(st.integers(1, 1 if name in ("llama31", "gpt_oss") else 2))
    calls = [
        {"type": "function", "id": "abcdefghi",
         "function": {"name": draw(st.sampled_from(["f", "get_time"])), "arguments": draw(arguments)}}
        for _ in range(many)
    ]  # fmt: skip
    message = {"role": "assistant", "tool_calls": calls}
    kind = draw(st.integers(0, 2))
    if kind == 1:
        message["content"] = draw(content)
    elif kind == 2 and CASES[name].thoughts:
        message["reasoning_content"] = draw(content)
    given_back = [{"role": "tool", "content": draw(content)} for _ in range(many)]
    return [message, *given_back, *draw(answer(name))]


@st.composite
def conversation(draw, name):
    case = CASES[name]
    messages = []
    if case.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    messages += draw(ask(name))
    kinds = [answer(name), errand(name)] if case.tools else [answer(name)]
    for turn in range(draw(st.integers(0, 4))):
        asks = turn % 2 if case.alternates else draw(st.integers(0, 2)) == 2
        messages += draw(ask(name) if asks else st.one_of(kinds))
    if draw(st.booleans()) and "content" in messages[-1]:  # an answer that repeats the prompt
        messages[-1]["content"] = draw(st.sampled_from([m.get("content", "") for m in messages]))
    # this template compares messages: of two equal ones it cannot be seen which is which
    asked = [m["content"] for m in messages if m["role"] == "user"]
    assume(name != "mistral_tools" or len(set(asked)) == len(asked))
    return messages


@st.composite
def stretches(draw, text):
    """Some `[start, stop]` of a text, in order."""
    count = draw(st.integers(1, min(2, (len(text) + 1) // 2)))
    size = st.integers(0, len(text))
    places = sorted(draw(st.lists(size, min_size=2 * count, max_size=2 * count, unique=True)))
    return [list(pair) for pair in zip(places[::2], places[1::2], strict=True)]


@st.composite
def wishes(draw, messages):
    """Messages that say themselves what of them is trained."""
    wished = []
    for message in messages:
        kinds = [None, None, True, False]
        text = message.get("content", "")
        if message["role"] not in ("user", "assistant") or "tool_calls" in message:
            kinds = [None, False] if message["role"] == "assistant" else [None]
        elif text and "think>" not in text:
            kinds.append(draw(stretches(text)))
        wish = draw(st.sampled_from(kinds))
        wished.append(message if wish is None else {**message, "train": wish})
    return wished


def oracle(name, messages, tools=None):
    parts = [part for part in CASES[name].oracle(messages, tools) if part.text]
    return "".join(part.text for part in parts), parts


def expected(name, messages, *, tools=None, train_on="assistant", end_of_turn=True):
    """The text, and of each character whether it is trained, by the oracle's word."""
    text, parts = oracle(name, messages, tools)
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    usual = {"assistant": answers, "last_assistant": answers[-1:], "all": range(len(messages))}
    mask = []
    for part in parts:
        if part.who is None:
            mask += [train_on == "all"] * len(part.text)
            continue
        message = messages[part.who]
        wish = message.get("train", part.who in usual[train_on])
        if part.what == "end":
            reached = isinstance(wish, list) and any(b == len(message["content"]) for _, b in wish)
            # under `all`, what a user's turn ends with is text like any other
            whole = train_on == "all" and part.who not in answers and wish is True
            ends = end_of_turn or whole
            on = ends and (wish is True or reached)
            mask += [on] * len(part.text)
        elif isinstance(wish, list):
            at = part.at
            mask += [
                at is not None and any(a <= at + k < b for a, b in wish)
                for k in range(len(part.text))
            ]
        else:
            mask += [wish] * len(part.text)
    return text, np.array(mask, dtype=bool)


def characters(rendered):
    mask = np.zeros(len(rendered.text), dtype=bool)
    for start, end in rendered.spans:
        mask[start:end] = True
    assert all(a < b for a, b in rendered.spans)
    assert all(b <= c for (_, b), (c, _) in zip(rendered.spans, rendered.spans[1:], strict=False))
    return mask


def given_tools(name):
    return st.sampled_from([None, [TOOL]]) if CASES[name].tools else st.none()


@pytest.mark.parametrize("name", CASES)
def test_characters(name):
    template = ChatTemplate(tokenizer_for(name))

    @settings(max_examples=60, deadline=None)
    @given(conversation(name), given_tools(name))
    def check(messages, tools):
        rendered = template.trained(messages, tools=tools)
        text, mask = expected(name, messages, tools=tools)
        assert rendered.text == text
        assert (characters(rendered) == mask).all(), (messages, rendered)

    check()


@pytest.mark.parametrize("name", CASES)
def test_options(name):
    """Last answers, whole texts, messages and stretches that say it themselves, ends left out."""
    template = ChatTemplate(tokenizer_for(name))

    @settings(max_examples=60, deadline=None)
    @given(
        conversation(name).flatmap(wishes),
        given_tools(name),
        st.sampled_from(["assistant", "last_assistant", "all"]),
        st.booleans(),
    )
    def check(messages, tools, train_on, end_of_turn):
        options = {"tools": tools, "train_on": train_on, "end_of_turn": end_of_turn}
        rendered = template.trained(messages, **options)
        text, mask = expected(name, messages, **options)
        assert rendered.text == text
        assert (characters(rendered) == mask).all(), (messages, rendered)

    check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("name", ["chatml", "mistral", "qwen3"])
def test_tokens(name, kind, trim_offsets):
    """A token is trained when it holds any of what the assistant wrote; positions are counted from
    the vocabulary, not from the tokenizer's offsets."""
    tokenizer = tokenizer_for(name, kind=kind, trim_offsets=trim_offsets)
    template, encode = ChatTemplate(tokenizer), TextEncoder(tokenizer)

    @settings(max_examples=25, deadline=None)
    @given(conversation(name))
    def check(messages):
        rendered = template.trained(messages)
        (encoding,) = encode([rendered.text], add_special_tokens=False)
        text, mask = expected(name, messages)
        # a character whose bytes lie in several tokens belongs to each of them
        wanted = [bool(mask[at].any()) for at in held(tokenizer, kind, text, encoding.ids)]
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


def test_an_end_token_in_a_content_is_no_end():
    """Where an empty system text decides what the template writes, sentinels stand elsewhere."""
    template = ChatTemplate(tokenizer_for("gpt_oss"))
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "say <|end|> to me", "train": True},
        {"role": "assistant", "content": "<|end|>"},
    ]
    rendered = template.trained(messages)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "say <|end|> to me<|end|>",
        "<|channel|>final<|message|><|end|><|return|>",
    ]


def test_an_end_token_in_a_call_without_end_is_refused():
    template = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    function = {"name": "f", "arguments": {"a": "b", "<|im_end|>": 3}}
    messages = [TALK[0], {"role": "assistant", "tool_calls": [{"function": function}]}]
    with pytest.raises(RowError, match="no clear end-of-turn token"):
        template.trained(messages)


def test_runs_of_white_space_end_no_turn():
    """Some vocabularies hold them as added tokens."""
    import copy

    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(tokenizer_for("gpt_oss"))
    tokenizer.add_tokens([AddedToken("\n\n", special=False)])
    messages = [
        {"role": "system", "content": ""},
        TALK[0],
        {"role": "assistant", "content": "a\n\n"},
    ]
    rendered = ChatTemplate(tokenizer).trained(messages)
    assert [rendered.text[a:b] for a, b in rendered.spans] == [
        "<|channel|>final<|message|>a\n\n<|return|>"
    ]


def test_a_stretch_of_what_is_stripped_on_one_side():
    """Qwen 3 strips line breaks off the start of an answer, and leaves those at its end."""
    template = with_template(QWEN3)
    talk = {"role": "user", "content": "q"}
    said = {"role": "assistant", "content": "\na\n", "train": [[0, 2]]}
    rendered = template.trained([talk, said])
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a"]
    rendered = template.trained([talk, {**said, "train": [[1, 3]]}])
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a\n<|im_end|>"]
    assert template.trained([talk, {**said, "train": [[0, 1]]}]).spans == []


def test_a_content_that_moves_the_end_without_changing_the_length():
    """The skeleton must make up the text to the letter, not only as many letters."""
    template = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|im_end|>!' if 'b' in m.content else '!<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rendered = template.trained(TALK)
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a!<|im_end|>", "b<|im_end|>"]


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
