"""A set and its samples as lines for a terminal of 80 columns or for a pipe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from arctic_like.cli.inspect_words import (
    SOURCE_COLUMNS,
    bins,
    document_head,
    histogram_head,
    sample_head,
    source_rows,
    summary,
    visible,
)

if TYPE_CHECKING:
    from rich.console import Console

    from arctic_like.data.decoding import Span
    from arctic_like.data.inspection import Histogram, SampleView, Statistics

WIDTH = 80
OPEN, CLOSE = "⟦", "⟧"

Line = list[tuple[str, str]]
"""Texts of a line with the names of their styles."""

STYLES = {
    "": "", "head": "bold", "border": "dim", "bar": "cyan",
    "trained": "green", "special": "cyan", "trained special": "reverse green",
}  # fmt: skip

LEGEND: Line = [
    ("trained", "trained"), (" · not trained · ", ""), ("<special token>", "special"), (" · ", ""),
    ("<trained special token>", "trained special"), (" · ↵ line end", ""),
]  # fmt: skip
PLAIN_LEGEND = (
    f"{OPEN}…{CLOSE} is trained · ↵ ends a line · \\ before a special token's name: is text"
)


def statistics_lines(found: Statistics) -> Iterator[Line]:
    """The numbers of a set."""
    yield [(found.name, "head")]
    for what, how_much in summary(found):
        yield [(f"  {what:<12}{how_much}", "")]
    if len(found.sources) > 1:
        yield []
        yield from _sources(found)
    if found.documents is not None:
        yield []
        yield from _histogram("documents as they were read", found.documents)
    yield []
    yield from _histogram("samples", found.samples)


def _sources(found: Statistics) -> Iterator[Line]:
    room = WIDTH - 10 * len(SOURCE_COLUMNS) - 2
    heads = "".join(f"{name:>10}" for name in SOURCE_COLUMNS)
    yield [(f"{'sources':<{room + 2}}{heads}", "head")]
    for title, values in source_rows(found):
        shown = visible(title)
        shown = shown if len(shown) <= room else "…" + shown[1 - room :]
        yield [(f"  {shown:<{room}}" + "".join(f"{value:>10}" for value in values), "")]


def _histogram(title: str, lengths: Histogram) -> Iterator[Line]:
    yield [(histogram_head(title, lengths), "head")]
    rows = bins(lengths)
    numbers = max(len(f"{number:,}") for _, number in rows)
    room = WIDTH - len(rows[0][0]) - numbers - 6
    most = max(max(number for _, number in rows), 1)
    for label, number in rows:
        yield [(f"  {label}  {number:>{numbers},}  ", ""), (_bar(number / most, room), "bar")]


def _bar(share: float, room: int) -> str:
    """A bar of eighths of a character; what is not nothing is seen."""
    eighths = max(round(share * room * 8), 1) if share else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + " ▏▎▍▌▋▊▉"[rest].strip()


def sample_lines(
    sample: SampleView, size: int, *, coloured: bool, names: Iterable[str]
) -> Iterator[Line]:
    """A sample, each document below the line that says where it comes from.

    Coloured, the text has styles; else what is trained stands in marks, and a text that reads like
    one of the special tokens' `names` has a backslash before it.
    """
    yield [(_rule("━", sample_head(sample, size)), "head")]
    for document in sample.documents:
        yield [(_rule("─", document_head(document)), "border")]
        if coloured:
            yield from _split([(visible(s.text), _style(s)) for s in document.spans])
        else:
            yield from _split([(_marked(document.spans, names), "")])


def _style(span: Span) -> str:
    return f"{'trained' if span.trained else ''} {'special' if span.special else ''}".strip()


def _rule(stroke: str, text: str) -> str:
    return f"{stroke * 2} {text} ".ljust(WIDTH, stroke)


def _split(line: Line) -> Iterator[Line]:
    """Lines of their own for a text with line ends."""
    current: Line = []
    for text, style in line:
        first, *rest = text.split("\n")
        current.append((first, style))
        for more in rest:
            yield current
            current = [(more, style)]
    if any(text for text, _ in current):
        yield current


def _marked(spans: Sequence[Span], names: Iterable[str]) -> str:
    """The text of spans with what is trained in marks; its own marks become escapes."""
    tokens = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name)
    written: list[str] = []
    inside = False
    for span in spans:
        text = span.text
        if not span.special:
            if tokens:
                text = re.sub(tokens, lambda match: "\\" + match[0], text)
            text = "".join(rf"\u{ord(c):04x}" if c in OPEN + CLOSE else c for c in text)
        if span.trained != inside:
            written.append(OPEN if span.trained else CLOSE)
            inside = span.trained
        written.append(visible(text))
    return "".join(written) + (CLOSE if inside else "")


def write(lines: Iterable[Line], console: Console | None) -> None:
    """Put lines on a terminal in colours, or out plainly where there is no console."""
    import click

    for line in lines:
        if console is None:
            click.echo("".join(text for text, _ in line).rstrip(" "))
            continue
        from rich.text import Text

        console.print(
            Text.assemble(*((text, STYLES[style]) for text, style in line)), soft_wrap=True
        )
