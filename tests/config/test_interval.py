"""When an interval is due, against counting the whole periods by hand."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from arctic_like.config.interval import Interval

ADAPTER = TypeAdapter(Interval)


def due_steps(text, last, **about):
    interval = Interval.of(text)
    return [step for step in range(last + 1) if interval.due(step, **about)]


def test_steps():
    assert due_steps(3, 10) == [3, 6, 9]
    assert due_steps("1e1", 25) == [10, 20]
    assert due_steps(0, 10) == []


def test_epochs():
    assert due_steps("1 epoch", 14, steps_per_epoch=7) == [7, 14]
    # period 3.5: its multiples 3.5, 7, 10.5, 14 fall due on the first step at or after them
    assert due_steps("0.5 epochs", 14, steps_per_epoch=7) == [4, 7, 11, 14]
    assert due_steps("2 epochs", 14, steps_per_epoch=7) == [14]


def test_percent_of_the_run():
    assert due_steps("25%", 10, total_steps=10) == [3, 5, 8, 10]
    assert due_steps("100%", 10, total_steps=10) == [10]
    assert due_steps("5%", 4, total_steps=4) == [1, 2, 3, 4]  # period 0.2: each step, once


def test_time():
    interval = Interval.of("10 min")
    assert not interval.due(5, seconds_since_last=599.9)
    assert interval.due(5, seconds_since_last=600.0)


@settings(deadline=None)
@given(st.fractions(min_value=Fraction(1, 100), max_value=50), st.integers(1, 60))
def test_no_period_is_lost(every, steps_per_epoch):
    """Up to any step, as often due as whole periods fit (at most once a step)."""
    interval = Interval(every, "epochs")
    period = every * steps_per_epoch
    due = [step for step in range(1, 200) if interval.due(step, steps_per_epoch=steps_per_epoch)]
    expected = {-(-(k * period) // 1) for k in range(1, int(200 / period) + 1)}
    assert due == sorted(step for step in expected if 1 <= step < 200)


@given(st.one_of(
    st.integers(0, 10**9).map(str),
    st.decimals(min_value="0.01", max_value=99, places=2).map("{} epochs".format),
    st.decimals(min_value="0.01", max_value=100, places=2).map("{}%".format),
    st.integers(1, 10**5).flatmap(lambda n: st.sampled_from([f"{n}s", f"{n} min", f"{n}h"])),
))  # fmt: skip
def test_dump_reads_back(text):
    interval = Interval.of(text)
    assert Interval.of(interval.dump()) == interval
    assert ADAPTER.validate_python(ADAPTER.dump_python(interval, mode="json")) == interval


@pytest.mark.parametrize(
    "value",
    [True, None, "abc", -1, "-1 epoch", "2.5", 2.5, "101%", "5%%", "5% epochs", [1], "1 year"],
)
def test_what_is_no_interval(value):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(value)


def test_questions_without_the_facts():
    with pytest.raises(ValueError, match="needs steps_per_epoch"):
        Interval.of("1 epoch").due(1)
    with pytest.raises(ValueError, match="needs total_steps"):
        Interval.of("5%").due(1)


def test_off_is_false():
    assert not Interval.of(0)
    assert not Interval.of("0 epochs")
    assert Interval.of(1)
