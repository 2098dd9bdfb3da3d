"""Rows as people have them → conversations or texts. Strict: what does not fit is an error.

A conversation is a list of messages with `role` and `content`, further keys as the chat template
knows them, and `train: false` where an assistant's turn is context only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_like.data.base import SourceConfig

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
CONTENT_KEYS = ("content", "value", "text", "message")

Message = dict[str, Any]


class RowError(ValueError):
    """A row that cannot be used; its text says what is there and what is expected, `hint` the way
    out."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.hint = hint
        super().__init__(message)


@dataclass(frozen=True)
class Pair:
    """A preference: two answers to one prompt."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


@dataclass(frozen=True)
class Unpaired:
    """A conversation, of which the last turns are the answer (the others have `train: false`), and
    whether the answer is wanted."""

    messages: list[Message]
    label: bool


def conversation(row: dict[str, Any], config: SourceConfig) -> list[Message]:
    """The messages of a row.

    From `role_mapping`, the column that the recipe names, `messages`, or `prompt` + `completion`
    (of which only the completion is trained). Raises RowError.
    """
    if config.role_mapping:
        messages = _mapped(row, config)
    elif config.column:
        messages = _turns(_column(row, config.column), config.column, config)
    elif "messages" in row:
        messages = _turns(row["messages"], "messages", config)
    elif "prompt" in row and "completion" in row:
        prompt = _as_turns(row["prompt"], "prompt", "user", config)
        completion = _as_turns(row["completion"], "completion", "assistant", config)
        messages = [{**message, "train": False} for message in prompt] + completion
    else:
        raise RowError(
            f"has the columns {_names(row)}; expected is `messages`, or `prompt` and `completion`; "
            "name another column with `column`, or map the roles with `role_mapping`"
        )
    if not messages:
        raise RowError("is an empty conversation; expected is at least one message")
    allowed = {*ROLES, *config.role_mapping}
    return [_checked(message, number, allowed) for number, message in enumerate(messages, 1)]


def text(row: dict[str, Any], config: SourceConfig) -> str:
    """The text of a row: the column that the recipe names, `text`, or the only one. Raises
    RowError."""
    name = config.column or ("text" if "text" in row or len(row) != 1 else next(iter(row)))
    if name == "text" and not config.column and "text" not in row:
        raise RowError(
            f"has the columns {_names(row)}; expected is `text`; name another one with `column`"
        )
    value = _column(row, name)
    if not isinstance(value, str):
        raise RowError(f"has {_kind(value)} in {name!r}; expected is text")
    return value


def tools(row: dict[str, Any]) -> list[Any] | None:
    """The tools that a conversation may call: the column `tools`, a list or its JSON. Raises
    RowError."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"has no JSON in 'tools' ({error}); expected is a list") from None
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"has {_kind(value)} in 'tools'; expected is a list of maps")
    return value


def pair(row: dict[str, Any], config: SourceConfig) -> Pair:
    """The preference of a row: `chosen` and `rejected`, with a `prompt` or what they have in
    common. Raises RowError."""
    for name in ("chosen", "rejected"):
        if name not in row:
            raise RowError(
                f"has the columns {_names(row)}; expected is `chosen` and `rejected`, and `prompt`"
            )
    chosen = _as_turns(row["chosen"], "chosen", "assistant", config)
    rejected = _as_turns(row["rejected"], "rejected", "assistant", config)
    if row.get("prompt") is not None:
        prompt = _as_turns(row["prompt"], "prompt", "user", config)
    else:
        prompt = []
    common = 0
    limit = min(len(chosen), len(rejected)) - 1
    while not prompt and common < limit and chosen[common] == rejected[common]:
        common += 1
    return Pair(prompt or chosen[:common], chosen[common:], rejected[common:])


def unpaired(row: dict[str, Any], config: SourceConfig) -> Unpaired:
    """The judged answer of a row: `prompt`, `completion` and `label`. Raises RowError."""
    if not isinstance(row.get("label"), bool):
        raise RowError(f"has {_kind(row.get('label'))} in 'label'; expected is true or false")
    return Unpaired(conversation(row, config), row["label"])


def tokens(row: dict[str, Any]) -> tuple[Sequence[int], Sequence[bool]]:
    """`input_ids` of a row that is tokenised already, and which are trained. Raises RowError."""
    ids = _column(row, "input_ids")
    if not _whole_numbers(ids):
        raise RowError("has no list of whole numbers in 'input_ids'")
    labels = row.get("labels")
    if labels is None:
        return ids, [True] * len(ids)
    if not _whole_numbers(labels) or len(labels) != len(ids):
        raise RowError("has 'labels' that are not as many whole numbers as 'input_ids'")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (-100, token):
            raise RowError(
                f"has the label {label} at the token {token} (number {place}); expected is the "
                "token itself, or -100 where it is not trained"
            )
    return ids, [label != -100 for label in labels]


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "(none)"


def _kind(value: Any) -> str:
    return {type(None): "null", list: "a list", dict: "a map"}.get(type(value), repr(value)[:60])


def _column(row: dict[str, Any], path: str) -> Any:
    """The value at a column or a dotted path into maps."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise RowError(f"has no {path!r}; its columns are {_names(row)}")
        value = value[key]
    return value


def _checked(message: Message, number: int, allowed: set[str]) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in allowed:
        raise RowError(
            f"has the role {role!r} in message {number}; expected is one of {', '.join(ROLES)}; "
            "map other names with `role_mapping`"
        )
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise RowError(f"has {_kind(content)} as the content of message {number}; expected is text")
    if not isinstance(message.get("train", True), bool):
        raise RowError(f"has {_kind(message['train'])} as `train` of message {number}")
    return {key: value for key, value in message.items() if value is not None}


def _content(turn: dict[str, Any], number: int, config: SourceConfig) -> Any:
    keys = (config.content_key,) if config.content_key else CONTENT_KEYS
    for key in keys:
        if key in turn:
            return turn[key]
    if turn.get("tool_calls"):
        return None
    raise RowError(
        f"has no {' / '.join(map(repr, keys))} in message {number}, only {_names(turn)}; "
        "name the key with `content_key`"
    )


def _turn_list(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError(f"has {_kind(value)} in {name!r}; expected is a list of messages")
    return value


def _turns(value: Any, name: str, config: SourceConfig) -> list[Message]:
    """A list with `role` and a content key in each turn, as messages; further keys are kept."""
    messages = []
    for number, turn in enumerate(_turn_list(value, name), 1):
        content = _content(turn, number, config)
        dropped = {config.content_key or "content", *CONTENT_KEYS}
        others = {key: item for key, item in turn.items() if key not in dropped}
        messages.append({**others, "content": content})
    return messages


def _as_turns(value: Any, name: str, role: str, config: SourceConfig) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, name, config)


def _mapped(row: dict[str, Any], config: SourceConfig) -> list[Message]:
    """Messages by `role_mapping`: columns in the mapping's order, system first; lists in their own.

    A list is walked once for all of its roles, so every turn is kept in its place; a turn whose
    name is a role itself (`system`, `tool`) needs no mapping.
    """
    messages: list[Message] = []
    walked: set[tuple[str, str]] = set()
    roles = sorted(config.role_mapping, key=lambda role: role != "system")
    for role in roles:
        path = config.role_mapping[role]
        listed = _list_path(row, path)
        if listed is None:
            value = _optional(row, path) if role == "system" else _column(row, path)
            if role != "system" or value:
                messages.append({"role": role, "content": value})
        elif listed not in walked:
            walked.add(listed)
            messages += _walk(row, *listed, config)
    return messages


def _optional(row: dict[str, Any], path: str) -> Any:
    try:
        return _column(row, path)
    except RowError:
        return None


def _list_path(row: dict[str, Any], path: str) -> tuple[str, str] | None:
    """(list, field) if `path` is `list.field.value` with a list there, or None for a plain
    column."""
    parts = path.rsplit(".", 2)
    if path in row or len(parts) != 3:
        return None
    return (parts[0], parts[1]) if isinstance(_optional(row, parts[0]), list) else None


def _walk(row: dict[str, Any], name: str, field: str, config: SourceConfig) -> list[Message]:
    roles = {
        path.rsplit(".", 1)[1]: role
        for role, path in config.role_mapping.items()
        if path.rsplit(".", 1)[0] == f"{name}.{field}"
    }
    messages = []
    for number, turn in enumerate(_turn_list(_column(row, name), name), 1):
        value = turn.get(field)
        role = roles.get(str(value), value if value in ROLES else None)
        if role is None:
            raise RowError(
                f"has {field} {value!r} in turn {number} of {name!r}; role_mapping knows "
                f"{', '.join(map(repr, roles))}"
            )
        messages.append({"role": role, "content": _content(turn, number, config)})
    return messages
