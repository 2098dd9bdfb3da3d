"""Documents of texts that belong together → samples: a sample is a unit, one row's texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import cache, packing
from arctic_like.data.base import Sample
from arctic_like.data.documents import Documents
from arctic_like.data.prepare import (
    COUNTS,
    Cut,
    Prepared,
    SourceDocuments,
    add_source_counts,
    by_source,
    duplicates,
    joined,
    samples_key,
    share_of,
    source_facts,
)
from arctic_like.data.samples import DocumentSamples, write_plan
from arctic_like.data.tokenise import Store
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_POSITIVE = np.uint64((1 << 63) - 1)


class WholeTexts(DocumentSamples):
    """Samples of texts. `segment_ids`: the number of the text within the sample. A text that was cut ends
    with its own special tokens."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pieces = self._bounds(index)
        lengths = self.pieces.length[pieces]
        sample["segment_ids"] = np.repeat(np.arange(len(pieces), dtype=np.int64), lengths)
        ends = np.cumsum(lengths)
        for number, piece in enumerate(pieces):
            part, document = self._where(piece)
            size = int(part.offsets[document + 1] - part.offsets[document])
            closing = int(part.columns["closing"][document])
            if lengths[number] < size and 0 < closing < lengths[number]:
                end = int(ends[number])
                last = int(part.offsets[document + 1])
                sample["input_ids"][end - closing : end] = part.tokens[last - closing : last]
        return sample


class UnitSamples(WholeTexts):
    """Also, at every token of a text, `roles` (0 anchor, 1 positive, 2 negative) and `text_keys`, a number
    from 0 on that only equal texts share."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pieces = self._bounds(index)
        found = [self._where(piece) for piece in pieces]
        roles = np.array([part.columns["role"][at] for part, at in found], dtype=np.int64)
        keys = np.array([part.digests[at] & _POSITIVE for part, at in found], dtype=np.int64)
        lengths = self.pieces.length[pieces]
        sample["roles"] = np.repeat(roles, lengths)
        sample["text_keys"] = np.repeat(keys, lengths)
        return sample


def unit_samples(
    sources: Sequence[SourceDocuments],
    cut: Cut,
    *,
    store: Store,
    share: tuple[float, float] = (0.0, 1.0),
    kind: str = "units of texts",
    made: type[WholeTexts] = UnitSamples,
) -> Prepared:
    """The samples of a set: a unit each, of weight 1, its texts of at most `cut.max_length` tokens.

    A unit begins with each document whose `role` is 0 (each one, where there are no roles). Under
    `truncate_right` a long text keeps its start, under `drop` its whole unit goes. Raises RecipeError where
    a text is too long under `error`.
    """
    parts = [Documents(source.folder) for source in sources]

    def prepare(folder: Path) -> dict[str, Any]:
        return _write(folder, sources, parts, cut, share)

    entry = cache.obtain(
        store.root / "samples", samples_key(kind, sources, cut, share), prepare,
        missing_ok=store.missing_ok, what="the cut data",
    )  # fmt: skip
    return Prepared(made(entry, parts), cache.facts(entry))


def _write(
    folder: Path,
    sources: Sequence[SourceDocuments],
    parts: Sequence[Documents],
    cut: Cut,
    share: tuple[float, float],
) -> dict[str, Any]:
    lengths = joined([part.lengths for part in parts])
    begins = np.flatnonzero(joined([_begins(part) for part in parts]))
    bounds = np.append(begins, len(lengths))
    units = share_of(len(begins), share, cut.seed)
    # the unit of every document of the set
    sizes = np.diff(bounds)[units]
    owner = np.repeat(np.arange(len(units)), sizes)
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    chosen = np.repeat(begins[units], sizes) + within
    long = lengths[chosen] > cut.max_length
    stays, found = np.ones(len(units), dtype=np.bool_), []
    for source, part, mine in zip(sources, parts, by_source(parts, chosen), strict=True):
        here = np.isin(chosen, mine)
        too_long = np.zeros(len(units), dtype=np.bool_)
        too_long[owner[long & here]] = True
        if too_long.any() and source.long_samples == "error":
            raise _too_long(parts, lengths, chosen[long & here], cut.max_length)
        dropped = too_long if source.long_samples == "drop" else np.zeros_like(too_long)
        stays &= ~dropped
        count, gone = int(too_long.sum()), int(dropped.sum())
        found.append({
            **source_facts(source, part), **dict.fromkeys(COUNTS, 0),
            "documents": len(np.unique(owner[here])), "long": count, "dropped": gone,
            "truncated": count - gone,
        })  # fmt: skip
    kept = stays[owner]
    pieces = packing.whole(lengths, chosen[kept])
    pieces = packing.Pieces(
        pieces.document, pieces.start, np.minimum(pieces.length, cut.max_length)
    )
    offsets = np.concatenate([[0], np.cumsum(sizes[stays])]).astype(np.int64)
    first = np.zeros(len(pieces), dtype=np.int64)
    first[offsets[:-1]] = 1
    write_plan(folder, pieces, offsets, first)
    add_source_counts(found, parts, chosen, pieces, pieces.length)
    tokens, count = int(pieces.length.sum()), len(offsets) - 1
    return {
        **{name: sum(one[name] for one in found) for name in (*COUNTS, "bad")},
        "duplicates": duplicates(parts, chosen),
        "samples": count,
        "texts": len(pieces),
        "tokens": tokens,
        "trained_tokens": tokens,
        "fill_rate": tokens / (len(pieces) * cut.max_length) if count else 0.0,
        "max_length": cut.max_length,
        "sources": found,
    }


def _begins(part: Documents) -> NDArray[np.int64]:
    """1 for the documents that a unit begins with."""
    role = part.columns.get("role")
    return np.ones(len(part), np.int64) if role is None else (role == 0).astype(np.int64)


def _too_long(
    parts: Sequence[Documents], lengths: NDArray[np.int64], long: NDArray[np.int64], most: int
) -> RecipeError:
    longest = int(long[np.argmax(lengths[long])])
    at = longest
    for part in parts:
        if at < len(part):
            break
        at -= len(part)
    return RecipeError(
        Problem(
            f"{len(long):,} texts are longer than {most:,} tokens, the longest ({part.place(at)}) has "
            f"{int(lengths[longest]):,}",
            place="data.max_length",
            hint="raise it, or set data.long_samples: truncate_right or drop",
        )
    )
