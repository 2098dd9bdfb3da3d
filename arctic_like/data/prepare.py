"""Documents of several sources → the samples of one set, as a plan in the cache.

Documents are cached uncut under what shapes their tokens (content, tokenizer, template, masks; see
`tokenise`), samples under the documents' keys and what shapes them (length, policy, packing).
Another `max_length` thus tokenises nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import cache, packing
from arctic_like.data.base import LongSamples
from arctic_like.data.documents import Documents
from arctic_like.data.order import key_of, permute
from arctic_like.data.samples import DocumentSamples, write_plan
from arctic_like.data.tokenise import Store
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEEP = {"drop": "drop", "truncate_left": "end", "truncate_right": "start", "split": "split"}
COUNTS = (
    "documents", "untrained", "long", "cut_to_nothing", "truncated", "split", "dropped",
)  # fmt: skip
"""What is counted of documents, in a set and in each of its sources; see `kept`."""


@dataclass(frozen=True)
class SourceDocuments:
    """The documents of one source in a set. folder: their entry in the cache. title: the source's
    name in reports. long_samples: what becomes of those above the set's `max_length`."""

    folder: Path
    title: str
    long_samples: LongSamples


@dataclass(frozen=True)
class Cut:
    """How documents become samples: the recipe's settings. fill: `always_max_length`. repeat:
    documents that do not fill one pack are repeated until it is full."""

    max_length: int
    pack: bool
    fill: bool
    seed: int
    repeat: bool = False


@dataclass
class Prepared:
    """One set, ready to read, and what became of its documents.

    facts: counts of the whole set, and as `sources` a list of those of each source.
    """

    samples: DocumentSamples
    facts: dict[str, Any] = field(default_factory=dict)


def samples(
    sources: Sequence[SourceDocuments],
    cut: Cut,
    *,
    store: Store,
    share: tuple[float, float] = (0.0, 1.0),
) -> Prepared:
    """The samples of a set from its sources' documents.

    share: the part of all documents that belongs to the set, in a keyed random order
    (`train_eval_split`). Raises RecipeError where a document is too long under `error`.
    """
    parts = [Documents(source.folder) for source in sources]

    def prepare(folder: Path) -> dict[str, Any]:
        return _write_samples(folder, sources, parts, cut, share)

    entry = cache.obtain(
        store.root / "samples", samples_key("documents", sources, cut, share), prepare,
        missing_ok=store.missing_ok, what="the packed data",
    )  # fmt: skip
    return Prepared(DocumentSamples(entry, parts), cache.facts(entry))


def samples_key(
    kind: str, sources: Sequence[SourceDocuments], cut: Cut, share: tuple[float, float]
) -> str:
    """The key of a set of samples. kind: what makes them of documents."""
    named = [[one.folder.name, one.title, one.long_samples] for one in sources]
    return cache.key_of([cache.VERSION, kind, named, repr(cut), list(share)])


def _write_samples(
    folder: Path,
    sources: Sequence[SourceDocuments],
    parts: Sequence[Documents],
    cut: Cut,
    share: tuple[float, float],
) -> dict[str, Any]:
    lengths = joined([part.lengths for part in parts])
    chosen = share_of(len(lengths), share, cut.seed)
    found: list[dict[str, Any]] = []
    stay = [packing.whole(lengths, chosen[:0])]
    for source, part, mine in zip(sources, parts, by_source(parts, chosen), strict=True):
        pieces, counts = kept(parts, packing.whole(lengths, mine), cut.max_length, source)
        stay.append(pieces)
        found.append({**source_facts(source, part), **counts})
    pieces, offsets, repeated = _arranged(packing.joined(stay), cut)
    weights = trained_counts(parts, pieces)
    pieces, offsets, weights, empty = _without_empty(pieces, offsets, weights)
    write_plan(folder, pieces, offsets, weights)
    add_source_counts(found, parts, chosen, pieces, weights)
    tokens, count = int(pieces.length.sum()), len(offsets) - 1
    return {
        **{name: sum(one[name] for one in found) for name in (*COUNTS, "bad")},
        "repeated": repeated,
        "empty_samples": empty,
        "duplicates": duplicates(parts, chosen),
        "samples": count,
        "tokens": tokens,
        "trained_tokens": int(weights.sum()),
        "fill_rate": tokens / (count * cut.max_length) if count else 0.0,
        "max_length": cut.max_length,
        "sources": found,
    }


def source_facts(source: SourceDocuments, part: Documents) -> dict[str, Any]:
    """What is told of a source beside the counts of its documents."""
    read = cache.facts(part.folder)
    known = ("bad", "bad_examples", "endless", "straddling")
    return {
        "title": source.title,
        "long_samples": source.long_samples,
        **{name: read[name] for name in known if name in read},
    }


def add_source_counts(
    found: Sequence[dict[str, Any]],
    parts: Sequence[Documents],
    chosen: NDArray[np.int64],
    pieces: packing.Pieces,
    weights: NDArray[np.int64],
) -> None:
    """Add to each source's facts what of it is in the set in the end.

    chosen: the set's documents, ascending. weights: labels of each piece.
    """
    firsts = _firsts(parts)
    owner = np.searchsorted(firsts, pieces.document, side="right") - 1
    for number, (facts, mine) in enumerate(zip(found, by_source(parts, chosen), strict=True)):
        own = owner == number
        facts["tokens"] = int(pieces.length[own].sum())
        facts["trained_tokens"] = int(weights[own].sum())
        facts["duplicates"] = duplicates(parts, mine)


def duplicates(parts: Sequence[Documents], documents: NDArray[np.int64]) -> int:
    """How many of some documents repeat the tokens of another."""
    every = np.concatenate([np.zeros(0, np.uint64), *(part.digests for part in parts)])
    return len(documents) - len(np.unique(every[documents]))


def _firsts(parts: Sequence[Documents]) -> NDArray[np.int64]:
    """The number of each source's first document."""
    return np.array(list(accumulate((len(part) for part in parts), initial=0))[:-1], np.int64)


def by_source(parts: Sequence[Documents], documents: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Ascending documents, those of each source apart."""
    return np.split(documents, np.searchsorted(documents, _firsts(parts)[1:])) if parts else []


def kept(
    parts: Sequence[Documents], pieces: packing.Pieces, max_length: int, source: SourceDocuments
) -> tuple[packing.Pieces, dict[str, int]]:
    """The documents of a source that stay, long ones cut, and how many did not.

    documents: all there were. untrained: had no trained token. long: more tokens than `max_length`;
    truncated: those of them that stayed, cut; split: those of these that became several pieces.
    cut_to_nothing: kept no trained token. dropped: all that are not in the set.
    """
    documents = len(pieces)
    trained = trained_counts(parts, pieces) > 0
    pieces = pieces.take(trained)
    long = int((pieces.length > max_length).sum())
    policy = source.long_samples
    if long and policy == "error":
        raise _too_long(parts, pieces, max_length)
    pieces = packing.cut(pieces, max_length=max_length, keep=_KEEP.get(policy, "drop"))
    before = len(np.unique(pieces.document))
    pieces = pieces.take(trained_counts(parts, pieces) > 0)
    stayed = len(np.unique(pieces.document))
    truncated = 0 if policy == "drop" else long - (before - stayed)
    return pieces, {
        "documents": documents,
        "untrained": documents - int(trained.sum()),
        "long": long,
        "cut_to_nothing": before - stayed,
        "truncated": truncated,
        "split": truncated if policy == "split" else 0,
        "dropped": documents - stayed,
    }


def share_of(size: int, share: tuple[float, float], seed: int) -> NDArray[np.int64]:
    """The numbers below `size` that are in a share, ascending. Shares that touch have none in
    common."""
    if share == (0.0, 1.0):
        return np.arange(size, dtype=np.int64)
    first, last = (round(bound * size) for bound in share)
    return np.sort(permute(np.arange(first, last), size=size, key=key_of(seed, 1)))


def _arranged(pieces: packing.Pieces, cut: Cut) -> tuple[packing.Pieces, NDArray[np.int64], int]:
    """(pieces, offsets, repeated): the pieces in the order of the samples, where each sample begins,
    and how many pieces are there again."""
    if not cut.pack:
        return pieces, np.arange(len(pieces) + 1, dtype=np.int64), 0
    before = len(pieces)
    if cut.repeat:
        pieces = packing.repeated(pieces, capacity=cut.max_length, exactly=cut.fill)
    repeated = len(pieces) - before
    if cut.fill:
        order = permute(np.arange(len(pieces)), size=len(pieces), key=key_of(cut.seed, 2))
        return *packing.end_to_end(pieces.take(order), capacity=cut.max_length), repeated
    order, offsets = packing.grouped(packing.best_fit(pieces.length, capacity=cut.max_length))
    return pieces.take(order), offsets, repeated


def _without_empty(
    pieces: packing.Pieces, offsets: NDArray[np.int64], weights: NDArray[np.int64]
) -> tuple[packing.Pieces, NDArray[np.int64], NDArray[np.int64], int]:
    """The samples that have a label, and how many have none: laid end to end, one may hold nothing
    but the middle of a prompt."""
    total = np.concatenate([[0], np.cumsum(weights)])
    full = total[offsets[1:]] > total[offsets[:-1]]
    empty = int((~full).sum())
    if not empty:
        return pieces, offsets, weights, 0
    sizes = np.diff(offsets)
    stays = np.repeat(full, sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes[full])])
    return pieces.take(stays), offsets, weights[stays], empty


def trained_counts(parts: Sequence[Documents], pieces: packing.Pieces) -> NDArray[np.int64]:
    """Labels of each piece."""
    weights = np.zeros(len(pieces), dtype=np.int64)
    first = 0
    for part in parts:
        own = (pieces.document >= first) & (pieces.document < first + len(part))
        mine = pieces.take(own)
        weights[own] = part.trained_counts(mine.document - first, mine.start, mine.length)
        first += len(part)
    return weights


def joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Arrays of int64, one after another."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def _too_long(parts: Sequence[Documents], pieces: packing.Pieces, max_length: int) -> RecipeError:
    long = pieces.take(pieces.length > max_length)
    longest = int(long.document[np.argmax(long.length)])
    for part in parts:
        if longest < len(part):
            break
        longest -= len(part)
    return RecipeError(
        Problem(
            f"{len(long):,} documents are longer than {max_length:,} tokens, the longest "
            f"({part.place(longest)}) has {int(long.length.max()):,}",
            place="data.max_length",
            hint="raise it, or set data.long_samples: drop, truncate_left, truncate_right or split",
        )
    )
