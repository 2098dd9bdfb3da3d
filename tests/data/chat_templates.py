# ruff: noqa: E501 (the templates stand as they ship)
"""Chat templates as models ship them, each with an oracle: plain Python that writes the same text and
says of every character whether the assistant wrote it. The two know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Parts = list[tuple[str, bool]]


@dataclass(frozen=True)
class Case:
    template: str
    oracle: Callable[[list[dict[str, str]]], Parts]
    tokens: tuple[str, ...]
    """Its special tokens."""
    alternates: bool = False
    """Users and assistants must take turns."""
    system: bool = True
    bos: str = ""
    eos: str = "<|endoftext|>"


CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def chatml(messages):
    parts = []
    if messages[0]["role"] != "system":
        parts.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False))
    for m in messages:
        answer = m["role"] == "assistant"
        parts += [
            (f"<|im_start|>{m['role']}\n", False),
            (m["content"] + "<|im_end|>", answer),
            ("\n", False),
        ]
    return parts


LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""


def llama3(messages):
    parts = [("<|begin_of_text|>", False)]
    for m in messages:
        parts.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        parts.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return parts


GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""


def gemma(messages):
    parts = [("<bos>", False)]
    for m in messages:
        answer = m["role"] == "assistant"
        parts += [
            (f"<start_of_turn>{'model' if answer else m['role']}\n", False),
            (m["content"].strip() + "<end_of_turn>", answer),
            ("\n", False),
        ]
    return parts


# the system text goes into the *last* user message: a prefix of the conversation renders otherwise
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- elif loop.index0 == loop_messages|length - 2 and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- endif %}
{%- endfor %}
"""


def mistral(messages):
    parts = [("<s>", False)]
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages[1:] if system is not None else messages
    users = [i for i, m in enumerate(turns) if m["role"] == "user"]
    for i, m in enumerate(turns):
        if m["role"] == "user":
            lead = f"{system}\n\n" if system is not None and i == users[-1] else ""
            parts.append((f"[INST] {lead}{m['content']}[/INST]", False))
        else:
            parts.append((f" {m['content'].strip()}</s>", True))
    return parts


QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def qwen3(messages):
    parts = []
    last_query = len(messages) - 1
    for i in range(len(messages) - 1, -1, -1):
        text = messages[i]["content"]
        tool = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if messages[i]["role"] == "user" and not tool:
            last_query = i
            break
    for i, m in enumerate(messages):
        content, thought = m["content"], ""
        if m["role"] != "assistant":
            parts.append((f"<|im_start|>{m['role']}\n{content}<|im_end|>\n", False))
            continue
        if "</think>" in content:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if i > last_query and (i == len(messages) - 1 or thought):
            stripped = thought.strip("\n")
            written = f"<think>\n{stripped}\n</think>\n\n" + content.lstrip("\n")
        else:
            written = content
        parts += [
            ("<|im_start|>assistant\n", False),
            (written + "<|im_end|>", True),
            ("\n", False),
        ]
    return parts


# the generation prompt goes on with a prefill that is not part of earlier turns
DEEPSEEK_R1 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""


def deepseek_r1(messages):
    parts = [("<｜begin▁of▁sentence｜>", False)]
    for i, m in enumerate(messages):
        if m["role"] == "system":
            parts += [(m["content"], False)] if i == 0 else []
        elif m["role"] == "user":
            parts.append(("<｜User｜>" + m["content"], False))
        else:
            parts.append(("<｜Assistant｜>", False))
            parts.append((m["content"].split("</think>")[-1] + "<｜end▁of▁sentence｜>", True))
    return parts


PHI = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""


def phi(messages):
    parts = []
    for m in messages:
        parts += [
            (f"<|{m['role']}|>\n", False),
            (m["content"] + "<|end|>", m["role"] == "assistant"),
            ("\n", False),
        ]
    return [*parts, ("<|endoftext|>", False)]


MARKED = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def marked(messages):
    parts = []
    for m in messages:
        answer = m["role"] == "assistant"
        content = m["content"].strip() if answer else m["content"]
        parts += [
            (f"<|im_start|>{m['role']}\n", False),
            (content + "<|im_end|>", answer),
            ("\n", False),
        ]
    return parts


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CASES = {
    "chatml": Case(CHATML, chatml, _IM),
    "llama3": Case(
        LLAMA3,
        llama3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "gemma": Case(
        GEMMA,
        gemma,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        alternates=True,
        system=False,
        bos="<bos>",
        eos="<eos>",
    ),
    "mistral": Case(
        MISTRAL,
        mistral,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        alternates=True,
        bos="<s>",
        eos="</s>",
    ),
    "qwen3": Case(QWEN3, qwen3, _IM),
    "deepseek_r1": Case(
        DEEPSEEK_R1,
        deepseek_r1,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "phi": Case(PHI, phi, ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "marked": Case(MARKED, marked, _IM),
}
