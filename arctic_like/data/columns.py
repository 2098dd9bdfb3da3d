"""Values of a row: by column, by dotted path, by template; and what is said where there is none."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any


class RowError(ValueError):
    """A row that cannot be used; its text says what is there and what is expected, `hint` the way
    out."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.hint = hint
        super().__init__(message)


def names(row: dict[str, Any]) -> str:
    """The columns of a row, for a sentence."""
    shown = [repr(name)[:40] for name in row]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return (", ".join(shown[:12]) or "(none)") + more


def kind(value: Any) -> str:
    """A value in a few characters, for a sentence."""
    return {type(None): "null", list: "a list", dict: "a map"}.get(type(value)) or (
        repr(value[:60] if isinstance(value, str) else value)[:60]
    )


def is_template(path: str) -> bool:
    """Whether a path is a template of columns: `{{ question }}`."""
    return "{{" in path or "{%" in path


def value_at(row: dict[str, Any], path: str) -> Any:
    """The value of a column, at a dotted path into maps, or the text of a template. Raises
    RowError where there is none."""
    if path in row:
        return row[path]
    if is_template(path):
        return _filled(path, row)
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise RowError(f"has no {path!r}; its columns are {names(row)}")
        value = value[key]
    return value


def optional(row: dict[str, Any], path: str) -> Any:
    """`value_at`, or None where there is nothing."""
    try:
        return value_at(row, path)
    except RowError:
        return None


def list_of_maps(value: Any, name: str, expected: str = "a list of messages") -> list[Any]:
    """A list of maps, also where it stands as JSON in a file without lists, or as a map of lists.
    Raises RowError."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(
                f"has no whole JSON in {name!r} ({error}); expected is {expected}"
            ) from None
    elif is_map_of_lists(value):
        value = [dict(zip(value, parts)) for parts in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise RowError(f"has {kind(value)} in {name!r}; expected is {expected}")
    for number, entry in enumerate(value, 1):
        if not isinstance(entry, dict):
            raise RowError(
                f"has {kind(entry)} as entry {number} of {name!r}; expected is {expected}"
            )
    return value


def is_map_of_lists(value: Any) -> bool:
    """Whether a value is a list of maps the other way round, as `datasets` gives a sequence of
    structs: one list a key, all of one length."""
    if not isinstance(value, dict) or not all(isinstance(part, list) for part in value.values()):
        return False
    return len({len(part) for part in value.values()}) == 1


def template_problem(path: str) -> str:
    """What is wrong with a template, seen without a row; empty where nothing is."""
    from jinja2 import TemplateError

    try:
        _compiled(path)
    except TemplateError as error:
        return str(error)
    return ""


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    # jinja's own escapes <, > and & for HTML
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template)


def _filled(template: str, row: dict[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return str(_compiled(template).render(row))
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise RowError(
            f"does not fill the template {template[:60]!r}: {error}; its columns are {names(row)}"
        ) from None
