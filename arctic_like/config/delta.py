"""`0.01` or `1%`: a difference, absolute or as a share of a value's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from arctic_like.config.base import wrong
from arctic_like.config.values import shown, to_float

_HINT = "write 0.01 (in the metric's unit) or 1% (of its best value)"


@dataclass(frozen=True)
class Delta:
    """A difference that counts. relative: `amount` is a share of the absolute value it is measured at."""

    amount: float = 0.0
    relative: bool = False

    @classmethod
    def of(cls, value: Any) -> Delta:
        """Read what a recipe states. Raises pydantic's custom error with a sentence and a way out."""
        if isinstance(value, Delta):
            return value
        amount = to_float(value)
        if amount < 0 or not math.isfinite(amount):
            raise wrong(f"is {shown(value)}, not a finite difference of at least 0", hint=_HINT)
        return cls(amount, isinstance(value, str) and value.strip().endswith("%"))

    def at(self, value: float) -> float:
        """The difference itself at `value`: the share is of |value|, so that it is right below 0 too."""
        if not self.relative:
            return self.amount
        return self.amount * abs(value) if math.isfinite(value) else 0.0

    def __bool__(self) -> bool:
        """False where any difference counts."""
        return self.amount > 0

    def __str__(self) -> str:
        return f"{self.amount * 100:g}%" if self.relative else f"{self.amount:g}"

    def dump(self) -> float | str:
        """What a recipe states for it; reads back to the same value."""
        return f"{Decimal(repr(self.amount)) * 100:f}%" if self.relative else self.amount

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.plain_serializer_function_ser_schema(cls.dump)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        text = {"type": "string", "pattern": r"^\s*[0-9.][0-9._^]*([eE][-+]?[0-9]+)?\s*%?\s*$"}
        return {"anyOf": [{"type": "number", "minimum": 0}, text]}
