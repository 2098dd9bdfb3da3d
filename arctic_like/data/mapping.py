"""`role_mapping`: messages from columns, from templates of columns, or from the turns of a list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arctic_like.data.columns import (
    RowError,
    is_map_of_lists,
    is_template,
    list_of_maps,
    optional,
    value_at,
)
from arctic_like.data.messages import ROLES, Message, content_of, rest

if TYPE_CHECKING:
    from arctic_like.data.base import SourceConfig


def mapped(row: dict[str, Any], config: SourceConfig) -> list[Message]:
    """Messages by `role_mapping`: columns in the mapping's order, system first; lists in their own.

    A list is walked once for all of its roles, so every turn is kept in its place; a turn whose
    name is a role itself (`system`, `tool`) needs no mapping. Raises RowError.
    """
    messages: list[Message] = []
    walked: set[tuple[str, str]] = set()
    for role in sorted(config.role_mapping, key=lambda role: role != "system"):
        path = config.role_mapping[role]
        listed = _list_path(row, path)
        if listed is None:
            value = optional(row, path) if role == "system" else value_at(row, path)
            if role != "system" or value:
                messages.append({"role": role, "content": value})
        elif listed not in walked:
            walked.add(listed)
            messages += _walk(row, *listed, config)
    return messages


def _list_path(row: dict[str, Any], path: str) -> tuple[str, str] | None:
    """(list, field) if `path` is `list.field.value` with a list there, or None for a plain
    column."""
    parts = path.rsplit(".", 2)
    if path in row or len(parts) != 3 or is_template(path):
        return None
    value = optional(row, parts[0])
    as_json = isinstance(value, str) and value.lstrip().startswith("[")
    listed = isinstance(value, list) or as_json or is_map_of_lists(value)
    return (parts[0], parts[1]) if listed else None


def _walk(row: dict[str, Any], name: str, field: str, config: SourceConfig) -> list[Message]:
    roles = {
        path.rsplit(".", 1)[1]: role
        for role, path in config.role_mapping.items()
        if path.rsplit(".", 1)[0] == f"{name}.{field}"
    }
    messages = []
    for number, turn in enumerate(list_of_maps(value_at(row, name), name), 1):
        value = turn.get(field)
        role = roles.get(str(value), value if value in ROLES else None)
        if role is None:
            raise RowError(
                f"has {field} {value!r} in turn {number} of {name!r}; role_mapping knows "
                f"{', '.join(map(repr, roles))}"
            )
        others = rest(turn, config, field)
        messages.append({"role": role, **others, "content": content_of(turn, number, config)})
    return messages
