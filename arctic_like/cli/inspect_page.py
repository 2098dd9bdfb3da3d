"""A set and its samples as one page of HTML that needs nothing else and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
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
    from arctic_like.data.decoding import Span
    from arctic_like.data.inspection import Histogram, SampleView, Statistics

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #667; --line: #d5d9e0;
  --trained: #d7f0da; --trained-ink: #0b4a1c; --special: #e6e9f5; --special-ink: #3a3f8f; --bar: #7a9cc6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --paper: #16181c; --soft: #9aa0ab;
  --line: #363a42; --trained: #173d22; --trained-ink: #b9f0c5; --special: #2a2d45; --special-ink: #b9befa;
  --bar: #4c6f9c; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
h3 { font-size: .9rem; font-weight: 600; color: var(--soft); margin: 1.2rem 0 .3rem;
  border-top: 1px solid var(--line); padding-top: .4rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top; font-weight: normal; }
th { color: var(--soft); white-space: nowrap; } td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.bars { width: 100%; } .bars td:last-child { width: 100%; }
.bars i { display: block; height: .8rem; margin-top: .3rem; background: var(--bar); border-radius: 2px; }
pre { font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.t { background: var(--trained); color: var(--trained-ink); border-bottom: 1px solid currentColor; }
.s { background: var(--special); color: var(--special-ink); border-radius: 3px; }
.s.t { background: var(--trained); color: var(--trained-ink); outline: 1px solid currentColor; }
.wide { overflow-x: auto; }
"""


def page(title: str, found: Statistics, samples: Sequence[SampleView], size: int) -> str:
    """The whole page. title: what was inspected. size: samples in the set."""
    body = [
        f"<h1>{escape(title)}: {escape(found.name)}</h1>",
        _table(summary(found)),
        *(_sources(found) if len(found.sources) > 1 else []),
        *(
            [_histogram("documents as they were read", found.documents)]
            if found.documents is not None
            else []
        ),
        _histogram("samples", found.samples),
        '<h2>Samples</h2><p><span class="t">trained</span> · not trained · '
        '<span class="s">special token</span> · <span class="s t">trained special token</span> · '
        "↵ ends a line</p>",
        *(_sample(sample, size) for sample in samples),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = "".join(
        f"<tr><th>{escape(what)}</th><td>{escape(how_much)}</td></tr>" for what, how_much in rows
    )
    return f"<table>{lines}</table>"


def _sources(found: Statistics) -> list[str]:
    heads = "".join(f'<th class="number">{escape(name)}</th>' for name in SOURCE_COLUMNS)
    lines = "".join(
        f"<tr><td>{escape(visible(title))}</td>"
        + "".join(f'<td class="number">{escape(value)}</td>' for value in values)
        + "</tr>"
        for title, values in source_rows(found)
    )
    table = f"<table><tr><th></th>{heads}</tr>{lines}</table>"
    return ["<h2>Sources</h2>", f'<div class="wide">{table}</div>']


def _histogram(title: str, lengths: Histogram) -> str:
    rows = bins(lengths)
    most = max(max(number for _, number in rows), 1)
    lines = "".join(
        f'<tr><td class="number">{escape(label.replace(" ", ""))}</td>'
        f'<td class="number">{number:,}</td>'
        f'<td><i style="width:{100 * number / most:.2f}%"></i></td></tr>'
        for label, number in rows
    )
    return f'<h2>{escape(histogram_head(title, lengths))}</h2><table class="bars">{lines}</table>'


def _sample(sample: SampleView, size: int) -> str:
    documents = "".join(
        f"<h3>{escape(document_head(document))}</h3><pre>{_text(document.spans)}</pre>"
        for document in sample.documents
    )
    return f"<section><h2>{escape(sample_head(sample, size))}</h2>{documents}</section>"


def _text(spans: Sequence[Span]) -> str:
    return "".join(_span(span) for span in spans)


def _span(span: Span) -> str:
    text = escape(visible(span.text))
    kinds = " ".join(("s",) * span.special + ("t",) * span.trained)
    return f'<span class="{kinds}">{text}</span>' if kinds else text
