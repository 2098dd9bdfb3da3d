"""`100`, `1 epoch`, `0.5 epochs`, `5%`, `10 min`: a value that is asked whether something is
due."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from arctic_like.config.base import wrong
from arctic_like.config.values import parse_number, shown

Unit = Literal["steps", "epochs", "percent", "seconds"]

_SECONDS = {"s": 1, "sec": 1, "second": 1, "seconds": 1, "min": 60, "minute": 60, "minutes": 60,
            "h": 3600, "hour": 3600, "hours": 3600}  # fmt: skip
_WORDS = re.compile(
    r"(.*?)\s*(steps?|epochs?|%|" + "|".join(sorted(_SECONDS, key=len)[::-1]) + r")?"
)
_RULE = "an interval"
_HINT = "write 100 (steps), 1 epoch, 5% (of the run), 10 min, or 0 for off"


@dataclass(frozen=True)
class Interval:
    """How often something happens. `every` is exact, in `unit`; 0 is never."""

    every: Fraction = Fraction(0)
    unit: Unit = "steps"

    @classmethod
    def of(cls, value: Any) -> Interval:
        """Read what a recipe states. Raises pydantic's custom error with a sentence and a way
        out."""
        if isinstance(value, Interval):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong(f"is {shown(value)}, not {_RULE}", hint=_HINT)
        try:
            every, unit = _read(value) if isinstance(value, str) else (Fraction(value), "steps")
        except (ValueError, OverflowError):
            raise wrong(f"is {shown(value)}, not {_RULE}", hint=_HINT) from None
        if every < 0:
            raise wrong(f"is {shown(value)}; an interval is not negative", hint=_HINT)
        if unit == "steps" and every.denominator != 1:
            raise wrong(f"is {shown(value)}; steps are whole numbers", hint=_HINT)
        if every >= 2**63:
            raise wrong(f"is {shown(value)}, more than 64 bits can hold", hint=_HINT)
        if unit == "percent" and every > 100:
            raise wrong(f"is {shown(value)}, more than the whole run", hint=_HINT)
        return cls(every, unit) if every else cls()

    def __bool__(self) -> bool:
        """False where it is off."""
        return self.every > 0

    def due(
        self,
        step: int,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        seconds_since_last: float = 0.0,
    ) -> bool:
        """Whether it is due after optimizer step `step` (1-based).

        With a period of p steps, a real number, it is due iff floor(step/p) > floor((step-1)/p):
        whole
        periods fall on their step, fractions on the first step at or after them, none is lost.
        An interval in time is due once `seconds_since_last` has reached it; ranks must
        agree on that number (rank 0's), as clocks differ.

        Raises ValueError where an interval in epochs or percent is asked without
        `steps_per_epoch` or `total_steps`.
        """
        if not self.every or step < 1:
            return False
        if self.unit == "seconds":
            return seconds_since_last >= self.every
        if self.unit == "steps":  # asked twice a step: whole numbers, not fractions
            return step % self.every.numerator == 0
        period = self.period(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        return period > 0 and step // period > (step - 1) // period

    def period(
        self, *, steps_per_epoch: int | None = None, total_steps: int | None = None
    ) -> Fraction:
        """The exact number of steps between two times; not for an interval in time."""
        if self.unit == "steps":
            return self.every
        if self.unit == "epochs" and steps_per_epoch is not None:
            return self.every * steps_per_epoch
        if self.unit == "percent" and total_steps is not None:
            return self.every * total_steps / 100
        needs = {"epochs": "steps_per_epoch", "percent": "total_steps"}.get(self.unit, "a clock")
        raise ValueError(f"an interval of {self} needs {needs}")

    def __str__(self) -> str:
        number = _decimal(self.every)
        if self.unit == "percent":
            return f"{number}%"
        if self.unit == "epochs":
            return f"{number} epoch" + ("" if self.every == 1 else "s")
        if self.unit == "seconds":
            whole = self.every % 60 == 0
            return f"{_decimal(self.every / 60)} min" if whole else f"{number} s"
        return number

    def dump(self) -> int | str:
        """What a recipe states for it; reads back to the same value."""
        return int(self.every) if self.unit == "steps" else str(self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.plain_serializer_function_ser_schema(cls.dump)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        units = "|".join(["steps?", "epochs?", "%", *sorted(_SECONDS, key=len)[::-1]])
        text = {
            "type": "string",
            "pattern": rf"^\s*[0-9.][0-9._^]*([eE][-+]?[0-9]+)?[kKmMi]*\s*({units})?\s*$",
        }
        return {"anyOf": [{"type": "integer", "minimum": 0}, text]}


def _read(text: str) -> tuple[Fraction, Unit]:
    match = _WORDS.fullmatch(text.strip())
    number, word = match.groups() if match else (text, None)
    if word is None or word.startswith("step"):
        if number.endswith("%"):
            raise ValueError(text)
        return parse_number(number), "steps"
    if number.endswith("%"):
        raise ValueError(text)
    if word == "%":
        return parse_number(number), "percent"
    if word.startswith("epoch"):
        return parse_number(number or "1"), "epochs"
    return parse_number(number or "1") * _SECONDS[word], "seconds"


def _decimal(value: Fraction) -> str:
    """Shortest exact decimal of a fraction that came from a decimal text; else as a quotient's
    float."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    digits = 0
    while rest % 10 == 0 or rest % 5 == 0 or rest % 2 == 0:
        rest //= 10 if rest % 10 == 0 else (5 if rest % 5 == 0 else 2)
        digits += 1
    if rest != 1:
        return repr(float(value))
    scaled = value * 10**digits
    text = f"{int(scaled):0{digits + 1}d}"
    return f"{text[:-digits]}.{text[-digits:]}".rstrip("0")
