"""Lists of turns as people have them → messages: `role`, `content`, and what a template knows.

Two ways to write a turn are read: `role` and `content`, and ShareGPT's `from` and `value`.
"""

from __future__ import annotations

import json
from collections.abc import Container
from typing import TYPE_CHECKING, Any

from arctic_like.data.columns import RowError, kind, list_of_maps, names

if TYPE_CHECKING:
    from arctic_like.data.base import SourceConfig

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
CONTENT_KEYS = ("content", "value", "text", "message")

SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
"""ShareGPT's names of roles; a role's own name stands for itself."""
CALLS = ("function_call", "tool_call")
"""ShareGPT's name of a turn that calls functions: JSON with `name` and `arguments`."""

Message = dict[str, Any]


def messages_of(
    value: Any, name: str, config: SourceConfig, *, sharegpt: bool = False
) -> list[Message]:
    """The messages of a list of turns. Further keys are kept, those that are null are left out.

    sharegpt: take ShareGPT's names of roles also under `role`. Raises RowError.
    """
    return [
        _message(turn, number, config, sharegpt=sharegpt)
        for number, turn in enumerate(list_of_maps(value, name), 1)
    ]


def messages_or_text(value: Any, name: str, role: str, config: SourceConfig) -> list[Message]:
    """A text as one message of `role`; a message, or a list of turns, as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of([value] if isinstance(value, dict) else value, name, config)


def _message(turn: Message, number: int, config: SourceConfig, *, sharegpt: bool) -> Message:
    usual = len(turn) == 2 and "role" in turn and type(turn.get("content")) is str
    if usual and not sharegpt and not config.content_key:
        return dict(turn)  # most are such: it halves the time
    key = "from" if turn.get("role") is None and "from" in turn else "role"
    role = turn.get(key)
    message = rest(turn, config, key)
    if sharegpt or key == "from":
        if role in CALLS:
            calls = _json_calls(content_of(turn, number, config), number)
            return {"role": "assistant", **message, "tool_calls": calls}
        role = SHAREGPT_ROLES.get(str(role).lower(), role)
    return {"role": role, **message, "content": content_of(turn, number, config)}


def rest(turn: Message, config: SourceConfig, role_key: str) -> Message:
    """What a turn holds beside role and content."""
    left_out = {role_key, "role", config.content_key or "content", *CONTENT_KEYS}
    return {key: value for key, value in turn.items() if key not in left_out}


def content_of(turn: Message, number: int, config: SourceConfig) -> Any:
    """A turn's content under any of its usual keys. Raises RowError where there is none."""
    keys = (config.content_key,) if config.content_key else CONTENT_KEYS
    there = [key for key in keys if key in turn]
    for key in there:
        if turn[key] is not None:
            return _text_of_parts(turn[key], number)
    if there or turn.get("tool_calls"):
        return None
    raise RowError(
        f"has no {' / '.join(map(repr, keys))} in message {number}, only {names(turn)}",
        hint="name the key with `content_key`",
    )


def _text_of_parts(content: Any, number: int) -> Any:
    """The text of a content in parts (`[{type: text, text: …}]`); anything else as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"has a part of type {kind(part.get('type'))} in message {number}; expected is text"
            )
    return "".join(part["text"] for part in content)


def _json_calls(content: Any, number: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(content)
    except (TypeError, ValueError):
        raise RowError(
            f"has {kind(content)} in the call of message {number}; expected is JSON with `name` "
            "and `arguments`"
        ) from None
    return _calls(found if isinstance(found, list) else [found], number)


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Calls as templates know them: `function` has a name, and a map of arguments."""
    calls = []
    for call in list_of_maps(value, f"tool_calls of message {number}", "a list of calls"):
        function = call.get("function") if "function" in call else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"has a call without a function's name in message {number}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # templates write arguments as JSON: a text would be quoted once more
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise RowError(
                    f"has arguments that are no JSON in a call of message {number}: "
                    f"{kind(arguments)}"
                ) from None
        around = {} if function is call else {k: v for k, v in call.items() if v is not None}
        function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        calls.append({"type": "function", **around, "function": function})
    return calls


def checked(messages: list[Message], allowed: Container[Any] = ROLES) -> list[Message]:
    """The messages as templates take them. Raises RowError naming the one that is wrong."""
    if not messages:
        raise RowError("is an empty conversation; expected is at least one message")
    return [_checked(message, number, allowed) for number, message in enumerate(messages, 1)]


def _checked(message: Message, number: int, allowed: Container[Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    if len(message) == 2 and type(content) is str and type(role) is str and role in allowed:
        return message
    calls = message.get("tool_calls")
    if not isinstance(role, str) or role not in allowed:
        raise RowError(
            f"has the role {kind(role)} in message {number}; expected is one of {', '.join(ROLES)}",
            hint="map other names with `role_mapping`",
        )
    if not isinstance(content, str) and not (content is None and calls):
        raise RowError(f"has {kind(content)} as the content of message {number}; expected is text")
    result = {key: value for key, value in message.items() if value is not None}
    if calls:
        result["tool_calls"] = _calls(calls, number)
    weight = result.pop("weight", None)
    if role == "assistant" and type(weight) in (int, float) and weight in (0, 1):
        # OpenAI's way to say which answers are trained
        result.setdefault("train", bool(weight))
    if "train" in result:
        result["train"] = _train(result["train"], content or "", number)
    return result


def _train(value: Any, content: str, number: int) -> bool | list[list[int]]:
    """`train` of a message: true, false, or stretches of its content."""
    if isinstance(value, bool):
        return value
    expected = "expected is true, false, or a list of [start, stop]"
    if not isinstance(value, list):
        raise RowError(f"has {kind(value)} as `train` of message {number}; {expected}")
    end = 0
    for span in value:
        whole = isinstance(span, list) and len(span) == 2 and all(type(at) is int for at in span)
        if not whole:
            raise RowError(f"has {kind(span)} in `train` of message {number}; {expected}")
        if not end <= span[0] < span[1] <= len(content):
            raise RowError(
                f"has {span} in `train` of message {number}; expected are stretches in order, "
                f"within the {len(content)} characters of its content"
            )
        end = span[1]
    return value
