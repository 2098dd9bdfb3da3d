"""Values as people write them: numbers (`10^6`, `4Ki`, `1.25M`, `5%`), dtypes, paths, lists of one.

Each is a pydantic annotated type that a part's config uses like a plain type:

    learning_rate: HumanFloat = Field(default=1e-5, ge=0)
    name_or_path: NameOrPath = ""

Strict where YAML is lax: a bool is not a number, 3.5 is not a whole number, `nan` is none at all.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from arctic_like.config.base import wrong

_POWERS = {name: 10 ** (3 * (i + 1)) for i, name in enumerate(("k", "m", "b", "t"))} | {"g": 10**9}
_UNITS = _POWERS | {name: 2 ** (10 * (i + 1)) for i, name in enumerate(("ki", "mi", "gi", "ti"))}
_PLAIN = r"[-+]?(?:\d+(?:_\d+)*\.?(?:\d+(?:_\d+)*)?|\.\d+)(?:[eE][-+]?\d{1,4})?"
_NUMBER = re.compile(rf"({_PLAIN})\s*([kmbgtKMBGT]i?|%)?")
_POWER = re.compile(r"([-+]?)(\d{1,6})\^([-+]?\d{1,4})")
_PATTERN = (
    r"^\s*([-+]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][-+]?\d+)?\s*([kmbgtKMBGT]i?|%)?"
    r"|[-+]?\d+\^[-+]?\d+)\s*$"
)


def parse_number(text: str) -> Fraction:
    """The exact value of a number as people write it.

    `k M B|G T` are powers of 1000 and `Ki Mi Gi Ti` of 1024, in either case; `10^6` is a power;
    `5%` is 1/20;
    `1_000` is 1000. Raises ValueError where the text is none of these.
    """
    stripped = text.strip()
    if match := _POWER.fullmatch(stripped):
        sign, base, exponent = match.groups()
        if int(base) == 0 and int(exponent) < 0:
            raise ValueError(text)
        return Fraction(int(base)) ** int(exponent) * (-1 if sign == "-" else 1)
    if match := _NUMBER.fullmatch(stripped):
        number, unit = match.groups()
        exact = Fraction(number.replace("_", ""))
        if unit == "%":
            return exact / 100
        return exact * _UNITS[unit.lower()] if unit else exact
    raise ValueError(text)


def shown(value: Any) -> str:
    """A value as it stands in a recipe, shortened to one line."""
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "…" + text[-1:]


def _exact(value: Any, rule: str) -> Fraction | None:
    """The exact number, or None where a float is infinite (which `to_float` lets pass)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong(f"is {shown(value)}, not {rule}")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        return parse_number(value) if isinstance(value, str) else Fraction(value)
    except ValueError:
        raise wrong(f"is {shown(value)}, not {rule}") from None


def to_int(value: Any) -> int:
    """A whole number from what a recipe states: 100, `10^6`, `4Ki`, `1.25M`, `1e6`."""
    rule = "a whole number"
    exact = _exact(value, rule)
    if exact is None or exact.denominator != 1:
        raise wrong(f"is {shown(value)}, not {rule}")
    if not -(2**63) <= exact < 2**63:
        raise wrong(f"is {shown(value)}, more than 64 bits can hold")
    return exact.numerator


def to_float(value: Any) -> float:
    """A number from what a recipe states: 0.1, `1e-5`, `10^-4`, `5%`. Infinity is one, NaN is
    not."""
    rule = "a number"
    if isinstance(value, str) and value.strip().lower() in {".inf", "inf", "+.inf"}:
        return math.inf
    exact = _exact(value, rule)
    if exact is None:
        if math.isnan(value):
            raise wrong(f"is {value}, not {rule}")
        return float(value)
    try:
        return float(exact)
    except OverflowError:
        raise wrong(f"is {shown(value)}, more than a float can hold") from None


HumanInt = Annotated[
    int,
    BeforeValidator(to_int),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": _PATTERN}]}),
]
"""A whole number: `100`, `10^6`, `4Ki`, `1.25M`."""

HumanFloat = Annotated[
    float,
    BeforeValidator(to_float),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": _PATTERN}]}),
]
"""A number: `0.1`, `1e-5`, `10^-4`, `5%`."""

_DTYPES = {
    "bf16": "bf16", "bfloat16": "bf16", "torch.bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16", "torch.float16": "fp16",
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "torch.float32": "fp32",
}  # fmt: skip
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Canonical name → the attribute of torch: `getattr(torch, TORCH_DTYPES[config.dtype])`."""


def to_dtype(value: Any) -> str:
    """The canonical name of a dtype: "bf16", "fp16" or "fp32"."""
    found = _DTYPES.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise wrong(f"is {shown(value)}, not a dtype", hint="write bf16, fp16 or fp32")
    return found


DType = Annotated[
    str, BeforeValidator(to_dtype), WithJsonSchema({"enum": [*_DTYPES], "type": "string"})
]
"""`bf16 | fp16 | fp32` (also `bfloat16`, `float16`, `float32`); validated to the short name."""


@dataclass(frozen=True)
class PathMark:
    """Marks a field as a path of the file that states it; `load_recipe` makes it absolute.

    name_too: the text may be a Hub name as well; it is a path only where it looks like one
    (`./ ../ ~ /`) or where such a file exists beside the stating file.
    """

    name_too: bool = False


RecipePath = Annotated[Path, PathMark()]
"""A path. Relative ones belong to the file that states them, an override's to the current
folder."""

NameOrPath = Annotated[str, PathMark(name_too=True)]
"""A Hub name or a path."""


@dataclass(frozen=True)
class OneOrMany:
    """Marks a list field that also accepts its one entry without the list: `Annotated[list[…],
    OneOrMany()]`."""

    def wrap(self, value: Any) -> Any:
        """The value as a list; None stays (and is refused by the list's own validation)."""
        return value if value is None or isinstance(value, list | tuple) else [value]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.wrap, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        entries = handler(schema)
        return {"anyOf": [entries, entries["items"]]}


@dataclass(frozen=True)
class UnnamedToo:
    """Marks a map of lists that also accepts one list.

    `Annotated[dict[str, list[…]], UnnamedToo("eval")]`

    The list becomes the map's one entry, under `name`; an empty one is an empty map.
    """

    name: str

    def wrap(self, value: Any) -> Any:
        """The value as a map; anything but a list stays."""
        if isinstance(value, list | tuple):
            return {self.name: value} if value else {}
        return value

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.wrap, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        entries = handler(schema)
        return {"anyOf": [entries, entries["additionalProperties"]]}
