"""Human numbers, dtypes and short forms, against decimal arithmetic done here."""

from decimal import Decimal
from fractions import Fraction
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from arctic_like.config.base import Config, PartConfig, wrong
from arctic_like.config.values import DType, HumanFloat, HumanInt, OneOrMany, parse_number

INT, FLOAT = TypeAdapter(HumanInt), TypeAdapter(HumanFloat)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100), (100, 100), ("10^6", 1_000_000), ("4Ki", 4096), ("4ki", 4096),
        ("1.25M", 1_250_000), ("1e6", 1_000_000), (1e6, 1_000_000), ("2b", 2 * 10**9),
        ("2G", 2 * 10**9), ("1_000", 1000), ("-3", -3), ("1.5 Ki", 1536), ("1Ti", 2**40),
        ("-2^3", -8), (-(2**63), -(2**63)),
    ],
)  # fmt: skip
def test_whole_numbers(text, value):
    result = INT.validate_python(text)
    assert result == value
    assert type(result) is int


@pytest.mark.parametrize(
    "text",
    [True, False, 3.5, "3.5", "abc", "", None, [1], {}, "5%", "1e-3", float("inf"), float("nan"),
     "10^-2", "0x10", "1 2", "١٢x", "4 Kib", "1e99999", 2**63, "10^99", "0^-1"],
)  # fmt: skip
def test_not_whole_numbers(text):
    with pytest.raises(ValidationError):
        INT.validate_python(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("5%", 0.05), ("10^-4", 1e-4), (3, 3.0), (0.1, 0.1), (".5", 0.5),
     ("1.25M", 1.25e6), (".inf", float("inf")), ("0.1", 0.1)],
)  # fmt: skip
def test_numbers(text, value):
    assert FLOAT.validate_python(text) == value


@pytest.mark.parametrize("text", [True, "abc", None, float("nan"), "nan", "10^999", [0.1]])
def test_not_numbers(text):
    with pytest.raises(ValidationError):
        FLOAT.validate_python(text)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9),
       st.sampled_from([("", 1), ("k", 10**3), ("M", 10**6), ("Ki", 2**10), ("Gi", 2**30)]))  # fmt: skip
def test_parsing_is_exact(number: Decimal, unit):
    suffix, factor = unit
    assert parse_number(f"{number:f}{suffix}") == Fraction(number) * factor


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_written_out_come_back(number):
    assert FLOAT.validate_python(repr(number)) == number
    assert FLOAT.validate_python(number) == number


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_written_out_come_back(number):
    assert INT.validate_python(str(number)) == number
    assert INT.validate_python(number) == number


def test_dtypes():
    adapter = TypeAdapter(DType)
    for short, names in {"bf16": ["bf16", "bfloat16", "BF16"], "fp16": ["fp16", "float16"],
                         "fp32": ["fp32", "float32"]}.items():  # fmt: skip
        assert {adapter.validate_python(name) for name in names} == {short}
    with pytest.raises(ValidationError, match="not a dtype"):
        adapter.validate_python("int8")


class _Several(Config):
    entries: Annotated[list[int], OneOrMany()] = []


def test_one_entry_stands_for_a_list():
    assert _Several(entries=3).entries == [3]
    assert _Several(entries=[3, 4]).entries == [3, 4]


class _Aliased(PartConfig):
    aliases = {"lr": "learning_rate"}
    learning_rate: HumanFloat = 1.0


def test_aliases_work_from_python_too():
    config = _Aliased.model_validate({"lr": "1e-3"})
    assert config.learning_rate == 1e-3
    assert config.given("learning_rate")
    with pytest.raises(ValidationError, match="same key"):
        _Aliased.model_validate({"lr": 1, "learning_rate": 1})
    assert config.replace(type="x").learning_rate == 1e-3


def test_the_text_of_an_error_may_hold_braces():
    assert str(wrong("is {value}, not {x!r}")) == "is {value}, not {x!r}"
