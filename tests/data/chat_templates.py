# ruff: noqa: E501 (the templates stand as they ship)
"""Chat templates as models ship them (shortened where they say the same at length), each with an
oracle: plain Python that writes the same text and says of every character which message wrote it.
The two know nothing of each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Part(NamedTuple):
    """A stretch of a rendered conversation.

    who: the message that wrote it, None for the template. what: "said" for what belongs to its turn,
    "end" for its end-of-turn token. at: where it stands in the message's content, if it is a stretch
    of it.
    """

    text: str
    who: int | None = None
    what: str = ""
    at: int | None = None


def said(who: int, text: str, at: int | None = None) -> Part:
    return Part(text, who, "said", at)


def end(who: int, text: str) -> Part:
    return Part(text, who, "end")


def content(who: int, message: dict, strip: str | None = "") -> Part:
    """The content of a message, stripped of `strip` on both sides (None: of white space)."""
    text = message["content"]
    if strip == "":
        return said(who, text, 0)
    kept = text.strip(strip)
    return said(who, kept, len(text) - len(text.lstrip(strip)) if kept else len(text))


def dumped(value) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Case:
    template: str
    oracle: Callable[..., list[Part]]
    tokens: tuple[str, ...]
    """Its added tokens."""
    alternates: bool = False
    """Users and assistants must take turns."""
    system: bool = True
    tools: bool = False
    """It knows calls of tools, their results, and lists of tools."""
    thoughts: bool = False
    """It knows `reasoning_content`."""
    bos: str = ""
    eos: str = "<|endoftext|>"


CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def chatml(messages, tools=None):
    parts = []
    if messages[0]["role"] != "system":
        parts.append(Part("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"))
    for i, m in enumerate(messages):
        parts += [
            Part(f"<|im_start|>{m['role']}\n"),
            content(i, m),
            end(i, "<|im_end|>"),
            Part("\n"),
        ]
    return parts


LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}"""


def llama3(messages, tools=None):
    parts = [Part("<|begin_of_text|>")]
    for i, m in enumerate(messages):
        parts.append(Part(f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n"))
        parts += [content(i, m, None), end(i, "<|eot_id|>")]
    return parts


# with a line that says the date, and tools in the first user's message
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first_user_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- "Given the following functions, please respond with a JSON for a function call.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""


def llama31(messages, tools=None):
    def header(role):
        return Part(f"<|start_header_id|>{role}<|end_header_id|>\n\n")

    parts = [Part("<|begin_of_text|>"), header("system")]
    parts.append(Part("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"))
    system = messages[0]["role"] == "system"
    if system:
        parts.append(content(0, messages[0], None))
    parts.append(Part("<|eot_id|>"))
    for i, m in enumerate(messages):
        if i == 0 and system:
            continue
        if i == int(system) and tools is not None:
            parts.append(header("user"))
            parts.append(
                Part(
                    "Given the following functions, please respond with a JSON for a function call.\n\n"
                )
            )
            parts += [Part(json.dumps(t, ensure_ascii=False, indent=4) + "\n\n") for t in tools]
            parts += [content(i, m, None), end(i, "<|eot_id|>")]
        elif m.get("tool_calls"):
            call = m["tool_calls"][0]["function"]
            text = f'{{"name": "{call["name"]}", "parameters": {dumped(call["arguments"])}}}'
            parts += [header("assistant"), said(i, text), end(i, "<|eot_id|>")]
        elif m["role"] == "tool":
            parts += [header("ipython"), said(i, dumped(m["content"])), end(i, "<|eot_id|>")]
        else:
            parts += [header(m["role"]), content(i, m, None), end(i, "<|eot_id|>")]
    return parts


GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""


def gemma(messages, tools=None):
    parts = [Part("<bos>")]
    for i, m in enumerate(messages):
        role = "model" if m["role"] == "assistant" else m["role"]
        parts += [
            Part(f"<start_of_turn>{role}\n"),
            content(i, m, None),
            end(i, "<end_of_turn>"),
            Part("\n"),
        ]
    return parts


# the system text goes into the first user's turn
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") + message['content'] | trim + '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""


def gemma3(messages, tools=None):
    parts = [Part("<bos>")]
    system = messages[0]["role"] == "system"
    for i, m in enumerate(messages):
        if i == 0 and system:
            continue
        role = "model" if m["role"] == "assistant" else m["role"]
        parts.append(Part(f"<start_of_turn>{role}\n"))
        if i == int(system) and system:
            parts += [said(0, messages[0]["content"], 0), Part("\n\n")]
        parts += [content(i, m, None), end(i, "<end_of_turn>"), Part("\n")]
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


def mistral(messages, tools=None):
    parts = [Part("<s>")]
    first = int(messages[0]["role"] == "system")
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    for i, m in enumerate(messages):
        if m["role"] == "user":
            parts.append(Part("[INST] "))
            if first and i == users[-1]:
                parts += [said(0, messages[0]["content"], 0), Part("\n\n")]
            parts += [content(i, m), end(i, "[/INST]")]
        elif m["role"] == "assistant":
            parts += [said(i, " "), content(i, m, None), end(i, "</s>")]
    return parts


# with the calls of tools
MISTRAL_TOOLS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}
"""


def mistral_tools(messages, tools=None):
    parts = [Part("<s>")]
    system = messages[0]["role"] == "system"
    last = [m for m in messages if m["role"] == "user"][-1:]
    for i, m in enumerate(messages):
        if m["role"] == "user":
            if tools is not None and [m] == last:
                parts.append(Part("[AVAILABLE_TOOLS] " + dumped(tools) + "[/AVAILABLE_TOOLS]"))
            parts.append(Part("[INST] "))
            if system and i == len(messages) - 1:
                parts += [said(0, messages[0]["content"], 0), Part("\n\n")]
            parts += [content(i, m), end(i, "[/INST]")]
        elif m.get("tool_calls"):
            calls = [dumped(c["function"])[:-1] + f', "id": "{c["id"]}"}}' for c in m["tool_calls"]]
            parts += [said(i, "[TOOL_CALLS] [" + ", ".join(calls) + "]"), end(i, "</s>")]
        elif m["role"] == "assistant":
            parts += [said(i, " "), content(i, m, None), end(i, "</s>")]
        elif m["role"] == "tool":
            parts += [
                Part('[TOOL_RESULTS] {"content": '),
                content(i, m),
                said(i, "}"),
                end(i, "[/TOOL_RESULTS]"),
            ]
    return parts


QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
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
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def qwen3(messages, tools=None):
    parts = []
    system = messages[0]["role"] == "system"
    if tools:
        parts.append(Part("<|im_start|>system\n"))
        if system:
            parts += [content(0, messages[0]), Part("\n\n")]
        parts.append(Part("# Tools\n\n<tools>" + "".join("\n" + dumped(t) for t in tools)))
        parts.append(Part("\n</tools><|im_end|>\n"))
    elif system:
        parts += [
            Part("<|im_start|>system\n"),
            content(0, messages[0]),
            end(0, "<|im_end|>"),
            Part("\n"),
        ]
    last_query = len(messages) - 1
    for i in range(len(messages) - 1, -1, -1):
        text = messages[i].get("content") or ""
        response = text.startswith("<tool_response>") and text.endswith("</tool_response>")
        if messages[i]["role"] == "user" and not response:
            last_query = i
            break
    for i, m in enumerate(messages):
        text = m.get("content") or ""
        if m["role"] in ("user", "system"):
            if m["role"] == "user" or i:
                parts += [
                    Part(f"<|im_start|>{m['role']}\n"),
                    content(i, m),
                    end(i, "<|im_end|>"),
                    Part("\n"),
                ]
        elif m["role"] == "tool":
            if i == 0 or messages[i - 1]["role"] != "tool":
                parts.append(Part("<|im_start|>user"))
            parts += [Part("\n<tool_response>\n"), content(i, m), Part("\n</tool_response>")]
            if i == len(messages) - 1 or messages[i + 1]["role"] != "tool":
                parts.append(Part("<|im_end|>\n"))
        else:
            thought = m.get("reasoning_content") or ""
            at = 0
            if not isinstance(m.get("reasoning_content"), str) and "</think>" in text:
                thought = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                whole, text = text, text.split("</think>")[-1].lstrip("\n")
                at = len(whole) - len(text)
            parts.append(Part("<|im_start|>assistant\n"))
            shown = text
            if i > last_query and (i == len(messages) - 1 or thought):
                stripped = thought.strip("\n")
                parts.append(said(i, f"<think>\n{stripped}\n</think>\n\n"))
                shown = text.lstrip("\n")
            parts.append(said(i, shown, at + len(text) - len(shown)))
            for n, call in enumerate(m.get("tool_calls", [])):
                lead = "\n" if text or n else ""
                function = call["function"]
                arguments = dumped(function["arguments"])
                parts.append(
                    said(
                        i,
                        f'{lead}<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>',
                    )
                )
            parts += [end(i, "<|im_end|>"), Part("\n")]
    return parts


# the generation prompt goes on with a prefill that is not part of earlier turns
DEEPSEEK_R1 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""


def deepseek_r1(messages, tools=None):
    parts = [Part("<｜begin▁of▁sentence｜>")]
    for i, m in enumerate(messages):
        text = m["content"]
        if m["role"] == "system":
            parts += [content(i, m)] if i == 0 else []
        elif m["role"] == "user":
            parts += [Part("<｜User｜>"), content(i, m)]
        else:
            kept = text.split("</think>")[-1]
            parts += [
                Part("<｜Assistant｜>"),
                said(i, kept, len(text) - len(kept)),
                end(i, "<｜end▁of▁sentence｜>"),
            ]
    return parts


# the header of an answer to tools is the end of their outputs
DEEPSEEK_V3 = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_tool=false, is_output_first=true) %}{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['tool_calls'] is defined %}{%- set ns.is_tool = false -%}{{'<｜Assistant｜>'}}{{ message['content'] or '' }}{{'<｜tool▁calls▁begin｜>'}}{%- for tool in message['tool_calls'] %}{%- if not loop.first %}{{'\\n'}}{%- endif %}{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments']|tojson + '\\n```<｜tool▁call▁end｜>'}}{%- endfor %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}{%- if message['role'] == 'assistant' and message['tool_calls'] is not defined %}{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- set ns.is_tool = false -%}{%- else %}{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- if not ns.is_tool %}{{'<｜tool▁outputs▁begin｜>'}}{%- set ns.is_tool = true -%}{%- endif %}{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"""


def deepseek_v3(messages, tools=None):
    parts = [Part("<｜begin▁of▁sentence｜>")]
    after_tool = False
    for i, m in enumerate(messages):
        if m["role"] == "system":
            parts += [content(i, m)] if i == 0 else []
        elif m["role"] == "user":
            after_tool = False
            parts += [Part("<｜User｜>"), content(i, m)]
        elif m["role"] == "tool":
            parts += [] if after_tool else [Part("<｜tool▁outputs▁begin｜>")]
            after_tool = True
            parts += [
                Part("<｜tool▁output▁begin｜>"),
                content(i, m),
                end(i, "<｜tool▁output▁end｜>"),
            ]
        elif m.get("tool_calls"):
            after_tool = False
            calls = [
                f"<｜tool▁call▁begin｜>{c['type']}<｜tool▁sep｜>{c['function']['name']}\n```json\n{dumped(c['function']['arguments'])}\n```<｜tool▁call▁end｜>"
                for c in m["tool_calls"]
            ]
            parts.append(Part("<｜Assistant｜>"))
            parts += [content(i, m)] if m.get("content") else []
            parts.append(
                said(i, "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>")
            )
            parts.append(end(i, "<｜end▁of▁sentence｜>"))
        else:
            parts.append(Part("<｜tool▁outputs▁end｜>" if after_tool else "<｜Assistant｜>"))
            parts += [content(i, m), end(i, "<｜end▁of▁sentence｜>")]
            after_tool = False
    return [*parts, Part("<｜tool▁outputs▁end｜>" if after_tool else "")]


PHI = """{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
' + message['content'] + '<|end|>
'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""


def phi(messages, tools=None):
    parts = []
    for i, m in enumerate(messages):
        parts += [Part(f"<|{m['role']}|>\n"), content(i, m), end(i, "<|end|>"), Part("\n")]
    return [*parts, Part("<|endoftext|>")]


# tokens that are put together from pieces; the end token of the text only without a prompt
PHI4 = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""


def phi4(messages, tools=None):
    parts = []
    for i, m in enumerate(messages):
        parts += [Part(f"<|{m['role']}|>"), content(i, m), end(i, "<|end|>")]
    return [*parts, Part("<|endoftext|>")]


# a turn in the middle ends otherwise than the last one; thoughts of the last one only; the date
GPT_OSS = """{{- "<|start|>system<|message|>You are ChatGPT.\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n# Valid channels: analysis, commentary, final.<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set developer_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if developer_message %}
        {{- "# Instructions\\n\\n" + developer_message + "\\n\\n" }}
    {%- endif %}
    {%- if tools %}
        {{- "# Tools\\n\\n" + tools | tojson }}
    {%- endif %}
    {{- "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "tool_calls" in message %}
            {%- set tool_call = message.tool_calls[0] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {%- if message.content and message.thinking %}
                {{- raise_exception("Cannot pass both content and thinking in an assistant message with tool calls!") }}
            {%- elif message.content %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.content + "<|end|>" }}
            {%- elif message.thinking %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant to=" }}
            {{- "functions." + tool_call.name + "<|channel|>commentary " }}
            {{- (tool_call.content_type if tool_call.content_type is defined else "json") + "<|message|>" }}
            {{- tool_call.arguments|tojson }}
            {{- "<|call|>" }}
            {%- set last_tool_call.name = tool_call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {%- if message.thinking %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last_tool_call.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}
            {{- raise_exception("Message has tool role, but there was no previous assistant message with a tool call!") }}
        {%- endif %}
        {{- "<|start|>functions." + last_tool_call.name }}
        {{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}"""


def gpt_oss(messages, tools=None):
    parts = [
        Part(
            "<|start|>system<|message|>You are ChatGPT.\nCurrent date: 2024-07-26\n\n# Valid channels: analysis, commentary, final.<|end|>"
        )
    ]
    system = messages[0]["role"] == "system"
    developer = messages[0]["content"] if system else ""
    if developer or tools:
        parts.append(Part("<|start|>developer<|message|>"))
        if developer:
            parts += [Part("# Instructions\n\n"), content(0, messages[0]), Part("\n\n")]
        if tools:
            parts.append(Part("# Tools\n\n" + dumped(tools)))
        parts.append(Part("<|end|>"))
    called = ""
    for i, m in enumerate(messages):
        thought = m.get("reasoning_content") or ""
        if m["role"] == "user":
            parts += [Part("<|start|>user<|message|>"), content(i, m), end(i, "<|end|>")]
        elif m["role"] == "tool":
            parts += [
                Part(f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>")
            ]
            parts += [said(i, dumped(m["content"])), end(i, "<|end|>")]
        elif m.get("tool_calls"):
            call = m["tool_calls"][0]["function"]
            called = call["name"]
            parts.append(Part("<|start|>assistant"))
            if m.get("content"):
                parts += [
                    said(i, "<|channel|>analysis<|message|>"),
                    content(i, m),
                    said(i, "<|end|><|start|>assistant"),
                ]
            elif thought:
                parts.append(
                    said(i, f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant")
                )
            parts.append(
                said(
                    i,
                    f" to=functions.{called}<|channel|>commentary json<|message|>{dumped(call['arguments'])}",
                )
            )
            parts.append(end(i, "<|call|>"))
        elif m["role"] == "assistant":
            last = i == len(messages) - 1
            parts.append(Part("<|start|>assistant"))
            if last and thought:
                parts.append(
                    said(i, f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant")
                )
            parts += [
                said(i, "<|channel|>final<|message|>"),
                content(i, m),
                end(i, "<|return|>" if last else "<|end|>"),
            ]
    return parts


MARKED = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '
' }}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def marked(messages, tools=None):
    parts = []
    for i, m in enumerate(messages):
        body = content(i, m, None) if m["role"] == "assistant" else content(i, m)
        parts += [Part(f"<|im_start|>{m['role']}\n"), body, end(i, "<|im_end|>"), Part("\n")]
    return parts


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]")
_CALLS = (
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK_CALLS = tuple(
    f"<｜tool▁{name}｜>"
    for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end", "outputs▁begin",
                 "output▁begin", "output▁end", "outputs▁end")
)  # fmt: skip
_PHI = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
_HARMONY = (
    "<|startoftext|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
)
_THINK = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

CASES = {
    "chatml": Case(CHATML, chatml, _IM),
    "llama3": Case(LLAMA3, llama3, _LLAMA, bos=_LLAMA[0], eos="<|eot_id|>"),
    "llama31": Case(LLAMA31, llama31, _LLAMA, bos=_LLAMA[0], eos="<|eot_id|>", tools=True),
    "gemma": Case(GEMMA, gemma, _GEMMA, alternates=True, system=False, bos="<bos>", eos="<eos>"),
    "gemma3": Case(GEMMA3, gemma3, _GEMMA, alternates=True, bos="<bos>", eos="<eos>"),
    "mistral": Case(MISTRAL, mistral, _MISTRAL, alternates=True, bos="<s>", eos="</s>"),
    "mistral_tools": Case(
        MISTRAL_TOOLS, mistral_tools, _MISTRAL + _CALLS, bos="<s>", eos="</s>", tools=True
    ),
    "qwen3": Case(QWEN3, qwen3, _IM + _THINK, tools=True, thoughts=True),
    "deepseek_r1": Case(DEEPSEEK_R1, deepseek_r1, _DEEPSEEK, bos=_DEEPSEEK[0], eos=_DEEPSEEK[1]),
    "deepseek_v3": Case(
        DEEPSEEK_V3, deepseek_v3, _DEEPSEEK + _DEEPSEEK_CALLS, bos=_DEEPSEEK[0], eos=_DEEPSEEK[1],
        tools=True,
    ),
    "phi": Case(PHI, phi, _PHI),
    "phi4": Case(PHI4, phi4, (*_PHI, "<|tool|>", "<|/tool|>")),
    "gpt_oss": Case(GPT_OSS, gpt_oss, _HARMONY, eos="<|return|>", tools=True, thoughts=True),
    "marked": Case(MARKED, marked, _IM),
}  # fmt: skip
