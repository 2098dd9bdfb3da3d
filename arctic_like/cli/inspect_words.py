"""What `inspect` says of a set, in words and rows, for the terminal and for the page alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arctic_like.cli.quantities import count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from arctic_like.data.inspection import DocumentView, Histogram, SampleView, Statistics

_JOINERS = "\u200c\u200d"
"""Format characters that belong to writing: Persian and Indic scripts, joined emoji."""


def visible(text: str) -> str:
    """A text in which everything can be seen and nothing steers a terminal or a page.

    Line ends and tabs are marked and kept, other characters that do not print become escapes.
    """
    return "".join(
        letter if letter.isprintable() or letter in _JOINERS
        else "↵\n" if letter == "\n"
        else "⇥\t" if letter == "\t"
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )  # fmt: skip


def percent(part: float, whole: float) -> str:
    """ "12.3%"; of nothing "–"."""
    return f"{part / whole:.1%}" if whole else "–"


def summary(found: Statistics) -> list[tuple[str, str]]:
    """(what, how much) of a set, line by line."""
    facts = found.facts
    tokens, trained = facts["tokens"], facts["trained_tokens"]
    filled = f", {facts['fill_rate']:.1%} filled" if found.packed and "fill_rate" in facts else ""
    kind = next((one for one in ("pairs", "rankings") if one in facts), "documents")
    twice = {"pairs": "2 × ", "rankings": f"{facts.get('answers')} × "}.get(kind, "")
    most = f" of up to {twice}{facts['max_length']:,} tokens" if "max_length" in facts else ""
    rows = [("samples", f"{facts['samples']:,}{most}{filled}")]
    if "documents" in facts:
        rows.append((kind, ", ".join(_fates(facts))))
    if "desirable" in facts:
        rows.append(
            ("answers", f"{facts['desirable']:,} desirable, {facts['undesirable']:,} undesirable")
        )
    rows.append(
        ("tokens", f"{tokens:,}, of which {trained:,} ({percent(trained, tokens)}) are trained")
    )
    if found.duplicates is not None:
        rows += _duplicates(found)
    for other, number in found.elsewhere.items():
        are = "document of {} is" if number == 1 else "documents of {} are"
        rows.append((f"as in {other}", f"{number:,} {are.format(other)} in this set too"))
    return rows


def _fates(facts: dict[str, Any]) -> Iterable[str]:
    yield f"{facts['documents']:,}"
    said = {
        "bad": "rows that cannot be used",
        "untrained": "without a trained token",
        "long": "too long",
        "truncated": "cut",
        "split": "split",
        "cut_to_nothing": "cut to nothing",
        "dropped": "dropped",
    }
    for name, words in said.items():
        if facts.get(name):
            yield f"{facts[name]:,} {words}"


def _duplicates(found: Statistics) -> Iterable[tuple[str, str]]:
    duplicates, documents = found.duplicates, found.documents
    assert duplicates is not None
    assert documents is not None
    if not duplicates.count:
        yield "duplicates", "none"
        return
    share = percent(duplicates.count, sum(documents.counts))
    one = duplicates.count == 1
    yield (
        "duplicates",
        f"{duplicates.count:,} document{'' if one else 's'} ({share}) repeat{'s' if one else ''} another",
    )
    for first, second, times in duplicates.examples:
        yield (
            "",
            f"{times:,} times: {visible(first)} = {visible(second)}" + (" …" if times > 2 else ""),
        )


def histogram_head(title: str, lengths: Histogram) -> str:
    """One line about a histogram."""
    return (
        f"{title}: {lengths.smallest:,} to {lengths.largest:,} tokens, "
        f"median {lengths.median:,.0f}, mean {lengths.mean:,.1f}"
    )


def bins(lengths: Histogram) -> list[tuple[str, int]]:
    """(from–to, how many) of each bin."""
    width = len(f"{lengths.edges[-1] - 1:,}")
    return [
        (f"{low:>{width},} – {high - 1:>{width},}", number)
        for low, high, number in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False)
    ]


SOURCE_COLUMNS = ("documents", "tokens", "trained", "dropped", "cut", "bad")


def source_rows(found: Statistics) -> list[tuple[str, list[str]]]:
    """(title, `SOURCE_COLUMNS`) of each source; a count that nobody keeps is empty."""
    rows = []
    for source in found.sources:
        tokens = int(source.get("tokens", 0))
        share = percent(int(source.get("trained_tokens", 0)), tokens)
        counts = ["" if name not in source else count(int(source[name]))
                  for name in ("dropped", "truncated", "bad")]  # fmt: skip
        documents = count(int(source.get("documents", source.get("rows", 0))))
        rows.append((str(source.get("title", "")), [documents, count(tokens), share, *counts]))
    return rows


def sample_head(sample: SampleView, size: int) -> str:
    """The line above a sample."""
    number = len(sample.documents)
    several = f", {number:,} documents" if number > 1 else ""
    return (
        f"sample {sample.index:,} of {size:,}: {sample.tokens:,} tokens, "
        f"{sample.trained:,} trained{several}"
    )


def document_head(document: DocumentView) -> str:
    """The line above a document: where it comes from and what it is."""
    role = f" ({document.role})" if document.role else ""
    tokens = f"{document.tokens:,} token{'' if document.tokens == 1 else 's'}"
    return f"{visible(document.place)}{role}: {tokens}, {document.trained:,} trained"
