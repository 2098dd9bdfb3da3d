"""The texts under a config's fields, read from the source when somebody asks for them.

Pydantic can read them too (`use_attribute_docstrings`), but does so for every class that is defined, by
parsing its file each time: 70 ms of a `validate` that shows none of them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from pydantic import BaseModel


@cache
def attribute_docs(config: type) -> Mapping[str, str]:
    """Field → the text that stands under it, inherited fields included; one line each."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if cls.__module__.split(".")[0] not in ("builtins", "pydantic", "abc", "typing"):
            found |= _own_docs(cls)
    return MappingProxyType(found)


def describe(config: type[BaseModel]) -> None:
    """Fill the `description` of a config's fields, as pydantic does with `use_attribute_docstrings`."""
    for name, text in attribute_docs(config).items():
        if name in config.model_fields:
            config.model_fields[name].description = text


def _own_docs(cls: type) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # defined in an interpreter's prompt, or built by type(…)
        return {}
    (body,) = ast.parse(textwrap.dedent(source)).body
    if not isinstance(body, ast.ClassDef):
        return {}
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = " ".join(text.value.value.split())
    return found
