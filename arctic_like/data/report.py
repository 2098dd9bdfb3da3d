"""What was read, cut and packed, as lines of at most 80 columns for the console."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_like.data.prepare import Cut, Prepared

_WIDTH = 80
_POLICY = {
    "error": "refused",
    "drop": "dropped",
    "truncate_left": "cut at their start",
    "truncate_right": "cut at their end",
    "split": "split",
}


def report(sets: dict[str, Prepared], cut: Cut) -> str:
    """A block for each set: its numbers, and of each source what a user should know of it."""
    lines: list[str] = []
    told: set[str] = set()
    for name, prepared in sets.items():
        lines += _of_set(name, prepared.facts, packed=cut.pack)
        folders = [str(part.folder) for part in prepared.samples.documents]
        sources: list[dict[str, Any]] = prepared.facts["sources"]
        for folder, source in zip(folders, sources, strict=True):
            # what was skipped while reading is not the business of each set that it is read for
            notes = list(_notes(source, read=folder not in told))
            told.add(folder)
            if len(sources) > 1:
                lines += _wrapped(2, f"{source['title']}: {_amounts(source)}")
            indent = 4 if len(sources) > 1 else 2
            lines += [line for note in notes for line in _wrapped(indent, note)]
    return "\n".join(lines)


def _of_set(name: str, facts: dict[str, Any], *, packed: bool) -> Iterator[str]:
    filled = f", {facts['fill_rate']:.1%} filled" if packed else ""
    yield from _wrapped(
        0,
        f"{name}: {facts['documents']:,} documents → {facts['samples']:,} samples of up to "
        f"{facts['max_length']:,} tokens{filled}",
    )
    yield f"  {facts['tokens']:,} tokens, {_trained(facts)} trained"
    if facts.get("repeated"):
        yield from _wrapped(
            2, f"{facts['repeated']:,} documents are there again to fill the sample"
        )
    if facts.get("empty_samples"):
        yield from _wrapped(
            2, f"{facts['empty_samples']:,} samples had no trained token and were dropped"
        )


def _amounts(source: dict[str, Any]) -> str:
    return (
        f"{source['documents']:,} documents, {source['tokens']:,} tokens, "
        f"{_trained(source)} trained"
    )


def _trained(facts: dict[str, Any]) -> str:
    return f"{facts['trained_tokens'] / facts['tokens']:.1%}" if facts["tokens"] else "0.0%"


def _notes(source: dict[str, Any], *, read: bool) -> Iterator[str]:
    """read: also what was seen while the source was read."""
    if read and source["bad"]:
        first = source["bad_examples"][0]
        yield (
            f"{source['bad']:,} rows cannot be used and were skipped, the first: "
            f"{first['place']} {first['message']}"
        )
    if source["untrained"]:
        yield f"{source['untrained']:,} documents have no trained token and were dropped"
    if source["long"]:
        policy = _POLICY[source["long_samples"]]
        yield f"{source['long']:,} documents were too long and {policy}"
    if source["cut_to_nothing"]:
        yield f"{source['cut_to_nothing']:,} of them kept no trained token and were dropped"
    if source["duplicates"]:
        yield f"{source['duplicates']:,} documents repeat another, token for token"
    if read and source.get("endless"):
        yield (
            f"{source['endless']:,} answers have no end-of-turn token in this chat template: the "
            "model does not learn to stop"
        )
    if read and source.get("straddling"):
        yield (
            f"{source['straddling']:,} tokens hold the end of a header and the start of an answer"
        )


def _wrapped(indent: int, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2),
        break_on_hyphens=False,
    )  # fmt: skip
