"""Prepared data as a person looks at it: samples as the model will see them, and numbers of a set.

Nothing here prints. Lengths are in tokens everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import cache
from arctic_like.data.decoding import Span, TokenText
from arctic_like.data.mix import JoinedSamples, SourcedSamples
from arctic_like.data.packing import IGNORED
from arctic_like.data.samples import DocumentSamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arctic_like.data.base import PreparedData, Sample, SampleSet
    from arctic_like.data.documents import Documents

_BINS = 12
_EXAMPLES = 3


@dataclass(frozen=True)
class DocumentView:
    """One document of a sample. role: "pair 0, chosen" and the like, empty for what is no
    preference."""

    place: str
    role: str
    tokens: int
    trained: int
    spans: list[Span]


@dataclass(frozen=True)
class SampleView:
    """One sample: its number in the set, and its documents in the order of the model's input."""

    index: int
    documents: list[DocumentView]

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return sum(document.tokens for document in self.documents)

    @property
    def trained(self) -> int:
        """Labels of all documents."""
        return sum(document.trained for document in self.documents)


def view(samples: SampleSet, index: int, text: TokenText) -> SampleView:
    """A sample, cut at its documents' borders: where positions begin anew or segments change."""
    sample = samples[index]
    tokens, labels = sample["input_ids"], sample["labels"]
    starts = _starts(sample)
    places = samples.places(index)
    if len(places) != len(starts):
        places = places[:1] * len(starts)
    documents = []
    for place, start, stop in zip(places, starts, [*starts[1:], len(tokens)], strict=True):
        trained = labels[start:stop] != IGNORED
        documents.append(
            DocumentView(
                place=place,
                role=_role(sample, start, getattr(samples, "unit", 2)),
                tokens=stop - start,
                trained=int(trained.sum()),
                spans=text.spans(tokens[start:stop].tolist(), trained.tolist()),
            )
        )
    return SampleView(index, documents)


def _starts(sample: Sample) -> list[int]:
    begins = sample["position_ids"] == 0
    segments = sample.get("segment_ids")
    if segments is not None:
        begins[1:] |= segments[1:] != segments[:-1]
    begins[:1] = True
    return [int(start) for start in np.flatnonzero(begins)]


def _role(sample: Sample, at: int, unit: int) -> str:
    """What a document is among preferences (`segment_ids`, `desirable`: see docs/design.md). unit: how many
    a pair or a ranking has."""
    if "desirable" in sample:
        return "desirable" if sample["desirable"][at] == 1 else "undesirable"
    if "segment_ids" in sample:
        pair, rejected = divmod(int(sample["segment_ids"][at]), unit)
        if unit > 2:
            return f"ranking {pair}, answer {rejected + 1}"
        return f"pair {pair}, {'rejected' if rejected else 'chosen'}"
    return ""


def chosen(size: int, count: int, seed: int) -> list[int]:
    """`count` numbers below `size` (all, if there are not so many), drawn by `seed`, ascending."""
    from arctic_like.data.order import key_of, permute

    drawn = permute(np.arange(min(count, size)), size=size, key=key_of(seed))
    return sorted(int(index) for index in drawn)


@dataclass(frozen=True)
class Histogram:
    """How many values lie in [edges[i], edges[i + 1]), and what lies in the middle."""

    edges: list[int]
    counts: list[int]
    smallest: int = 0
    largest: int = 0
    median: float = 0.0
    mean: float = 0.0


def histogram(lengths: NDArray[np.int64]) -> Histogram:
    """Lengths that are about alike in bins of one width, others in bins that double."""
    if not len(lengths):
        return Histogram([0, 1], [0])
    low, high = int(lengths.min()), int(lengths.max())
    if high <= 16 * max(low, 1):
        edges = _even(low, high)
    else:
        first = [0] if low == 0 else []
        powers = range(max(low.bit_length() - 1, 0), high.bit_length() + 1)
        edges = [*first, *(1 << power for power in powers)]
    counts = np.histogram(lengths, bins=edges)[0]
    return Histogram(
        edges, [int(count) for count in counts], low, high,
        float(np.median(lengths)), float(lengths.mean()),
    )  # fmt: skip


def _even(low: int, high: int) -> list[int]:
    """Edges at multiples of 1, 2 or 5 times a power of ten, for at most `_BINS` bins."""
    width = next(
        step * 10**power
        for power in range(20)
        for step in (1, 2, 5)
        if high // (step * 10**power) - low // (step * 10**power) < _BINS
    )
    return [width * number for number in range(low // width, high // width + 2)]


@dataclass(frozen=True)
class Duplicates:
    """Documents whose tokens are those of an earlier one. examples: the places of the most frequent
    ones, each with how many there are."""

    count: int
    examples: list[tuple[str, str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Statistics:
    """Numbers of a set.

    facts: as the preparation counted them, see `PreparedData.facts`. documents, duplicates: of the
    documents as they were read, before anything was cut or dropped; None where the set knows only
    samples. sources: one map of counts for each source. elsewhere: name of another set → how many
    documents of it are in this one too. packed: samples hold several documents.
    """

    name: str
    facts: dict[str, Any]
    samples: Histogram
    documents: Histogram | None
    duplicates: Duplicates | None
    sources: list[dict[str, Any]]
    elsewhere: dict[str, int]
    packed: bool = False


def statistics(data: PreparedData, name: str) -> Statistics:
    """Numbers of one set of prepared data. Reads no tokens."""
    sets = named_sets(data)
    samples = sets[name]
    facts = _facts(samples, data.facts if name == "train" else {})
    parts = list(_documents(samples))
    if not parts:
        return Statistics(name, facts, histogram(samples.lengths), None, None, [], {})
    lengths = np.concatenate([part.lengths for part in parts])
    mine = _used(samples)
    elsewhere = {
        other: int(np.isin(_used(there), mine).sum())
        for other, there in sets.items()
        if other != name
    }
    return Statistics(
        name=name,
        facts=facts,
        samples=histogram(samples.lengths),
        documents=histogram(lengths),
        duplicates=_duplicates(parts),
        sources=_sources(facts, parts, data.sources if name == "train" else ()),
        elsewhere={other: count for other, count in elsewhere.items() if count},
        packed=sum(len(plan.pieces) for plan in _plans(samples)) > len(samples),
    )


def named_sets(data: PreparedData) -> dict[str, SampleSet]:
    """All sets by name, `train` first."""
    train = {"train": data.train} if data.train is not None else {}
    return {**train, **data.evaluation, **data.test}


def _plans(samples: SampleSet) -> Iterator[DocumentSamples]:
    """The parts of a set that know their documents; a mix has several."""
    if isinstance(samples, DocumentSamples):
        yield samples
    elif isinstance(samples, SourcedSamples):
        yield samples.samples
    elif isinstance(samples, JoinedSamples):
        for part in samples.sets:
            yield from _plans(part)


def _documents(samples: SampleSet) -> Iterator[Documents]:
    for plan in _plans(samples):
        yield from plan.documents


def _facts(samples: SampleSet, known: dict[str, Any]) -> dict[str, Any]:
    if known:
        return dict(known)
    plans = list(_plans(samples))
    if len(plans) == 1:
        return cache.facts(plans[0].folder)
    trained = int(samples.weights.sum())
    return {
        "samples": len(samples), "tokens": int(samples.lengths.sum()), "trained_tokens": trained
    }  # fmt: skip


def _used(samples: SampleSet) -> NDArray[np.uint64]:
    """Digests of the documents that are in a set."""
    found = [np.zeros(0, dtype=np.uint64)]
    for plan in _plans(samples):
        every = np.concatenate([part.digests for part in plan.documents])
        found.append(every[np.unique(plan.pieces.document)])
    return np.concatenate(found)


def _duplicates(parts: Sequence[Documents]) -> Duplicates:
    digests = np.concatenate([part.digests for part in parts])
    if not len(digests):
        return Duplicates(0)
    _, first, which, counts = np.unique(
        digests, return_index=True, return_inverse=True, return_counts=True
    )
    examples = []
    for one in np.lexsort((first, -counts))[:_EXAMPLES]:
        if counts[one] > 1:
            again = np.flatnonzero(which == one)[:2]
            examples.append((*(_place(parts, int(at)) for at in again), int(counts[one])))
    return Duplicates(len(digests) - len(counts), examples)  # type: ignore[arg-type]


def _place(parts: Sequence[Documents], document: int) -> str:
    for part in parts:
        if document < len(part):
            return part.place(document)
        document -= len(part)
    raise IndexError(document)


def _sources(
    facts: dict[str, Any], parts: Sequence[Documents], titles: Sequence[str]
) -> list[dict[str, Any]]:
    """The counts of each source: of the preparation if it keeps them, else of what was read."""
    if facts.get("sources"):
        return [dict(source) for source in facts["sources"]]
    read = [cache.facts(part.folder) for part in parts]
    named = titles if len(titles) == len(read) else [one.get("source", "") for one in read]
    return [{**one, "title": title} for one, title in zip(read, named, strict=True)]
