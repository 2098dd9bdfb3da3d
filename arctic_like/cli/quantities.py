"""Numbers as people read them in a table: `13 MB`, `2.11M`, `3 h`; and ages as people write them."""

from __future__ import annotations

import re

_AGES = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d|w)")


def size(number: int) -> str:
    """Bytes in powers of 1000, two or three digits: "0 B", "4.1 kB", "13 MB"."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 9.95 or unit == "B" else f"{value:.1f} {unit}"


def count(number: int) -> str:
    """A whole number: in full below ten thousand, then with three digits: "9,999", "12.3k", "2.11M"."""
    if number < 10_000:
        return f"{number:,}"
    value, unit = float(number), ""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def age(seconds: float) -> str:
    """The largest unit that fits, rounded down: "5 s", "12 min", "3 h", "40 d"."""
    left = max(int(seconds), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if left >= length:
            return f"{left // length} {unit}"
    return f"{left} s"


def parse_age(text: str) -> float:
    """Seconds of "30d", "12 h", "2w". Raises ValueError for anything else."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no age")
    return float(match[1]) * _AGES[match[2]]
