"""Documents of preferences → samples: what belongs together stays together.

A *unit* is what one row became: the two documents of a pair, chosen first, those of a ranking, the best
first, or the one of an unpaired answer. Units are cut, dropped, held out and packed as wholes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import cache, packing
from arctic_like.data.base import LongSamples, Sample
from arctic_like.data.documents import Documents
from arctic_like.data.mismatched import PIECES, join_mismatched, with_mismatched
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
    trained_counts,
)
from arctic_like.data.samples import DocumentSamples, write_plan
from arctic_like.data.tokenise import Store
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMED = 3


class _PreferenceSamples(DocumentSamples):
    """Samples with `segment_ids`: the number of the document within the sample."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pieces = self._bounds(index)
        numbers = np.arange(len(pieces), dtype=np.int64)
        sample["segment_ids"] = np.repeat(numbers, self.pieces.length[pieces])
        return sample


class PairSamples(_PreferenceSamples):
    """Samples of pairs: `segment_ids` is 2 · pair + (0 chosen | 1 rejected). With margins, `margin` is
    that of the pair at every token, the 64 bits of a float as an integer. Of rankings of K answers,
    `segment_ids` is K · ranking + place, 0 the best."""

    unit = 2
    """Documents of a unit."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pieces = self._bounds(index)
        if all("margin" in part.columns for part in self.documents if len(part)):
            found = (self._where(piece) for piece in pieces)
            margins = np.array([part.columns["margin"][at] for part, at in found], dtype=np.int64)
            sample["margin"] = np.repeat(margins, self.pieces.length[pieces])
        return sample

    def sample_id(self, index: int) -> str:
        """Places of the sample's first pairs: "train.jsonl:17, train.jsonl:4 … +5"."""
        pairs = self._bounds(index)[:: self.unit]
        named = []
        for piece in pairs[:_NAMED]:
            part, document = self._where(piece)
            named.append(part.place(document))
        more = len(pairs) - len(named)
        return ", ".join(named) + (f" … +{more}" if more else "")


class UnpairedSamples(_PreferenceSamples):
    """Samples of judged answers: `desirable` is 1 or 0 at every token."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pieces = self._bounds(index)
        found = (self._where(piece) for piece in pieces)
        labels = np.array([part.columns["desirable"][at] for part, at in found], dtype=np.int64)
        sample["desirable"] = np.repeat(labels, self.pieces.length[pieces])
        return sample


class MismatchedSamples(UnpairedSamples):
    """The same, and behind each judged answer (document 2k) its prompt with another one's (2k + 1);
    `desirable` is the judged answer's in both."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        pieces = self._bounds(index)
        opens = []
        for piece in pieces:
            part, document = self._where(piece)
            opens.append(part.trained[part.offsets[document] + self.pieces.start[piece]] > 0)
        lengths = self.pieces.length[pieces]
        join_mismatched(sample, lengths, np.array(opens))
        of_units = sample["desirable"][np.cumsum(lengths)[::PIECES] - 1]
        sample["desirable"] = np.repeat(of_units, lengths.reshape(-1, PIECES).sum(axis=1))
        return sample

    def places(self, index: int) -> list[str]:
        """Where each judged answer comes from, and each prompt with its other answer."""
        found = []
        for judged in self._bounds(index)[::PIECES]:
            prompt, other = self._place(judged), self._place(judged + 2)
            found += [prompt, f"{prompt} + {other}"]
        return found

    def sample_id(self, index: int) -> str:
        """Places of the sample's first judged answers: "train.jsonl:17, train.jsonl:4 … +5"."""
        judged = self._bounds(index)[::PIECES]
        named = ", ".join(self._place(piece) for piece in judged[:_NAMED])
        return named + (f" … +{len(judged) - _NAMED}" if len(judged) > _NAMED else "")


def preference_samples(
    sources: Sequence[SourceDocuments],
    cut: Cut,
    *,
    documents: int,
    store: Store,
    share: tuple[float, float] = (0.0, 1.0),
    mismatched: bool = False,
) -> Prepared:
    """The samples of a set of preferences.

    documents: of a unit, 2 for pairs, K for rankings of K answers. mismatched: behind each judged answer its
    prompt with another one's (`mismatched.py`), which is a second document of the unit. Each document has at
    most `cut.max_length` tokens; a sample holds one unit, or with packing as many as fit into as many times
    as many tokens as a unit has documents. Its weight is the number of its units. Under `truncate_left` all
    documents of a unit lose as much, and only of their prompt; a unit that would lose its prompt or an
    answer is dropped (`cut_to_nothing`). Raises RecipeError where a unit is too long under `error`.
    """
    parts = [Documents(source.folder) for source in sources]
    kind = f"preferences of {documents}" + (" with mismatched answers" if mismatched else "")
    key = samples_key(kind, sources, cut, share)

    def prepare(folder: Path) -> dict[str, Any]:
        return _Plan(sources, parts, cut, documents, mismatched).write(folder, share)

    entry = cache.obtain(
        store.root / "samples", key, prepare, missing_ok=store.missing_ok, what="the packed data"
    )
    if documents > 1:
        pairs = PairSamples(entry, parts)
        pairs.unit = documents
        return Prepared(pairs, cache.facts(entry))
    made = MismatchedSamples if mismatched else UnpairedSamples
    return Prepared(made(entry, parts), cache.facts(entry))


class _Plan:
    """Which units make up which sample. Arrays of units are (units, documents) int64."""

    def __init__(
        self,
        sources: Sequence[SourceDocuments],
        parts: Sequence[Documents],
        cut: Cut,
        documents: int,
        mismatched: bool = False,
    ) -> None:
        self.mismatched = mismatched
        self.sources = sources
        self.parts = parts
        self.cut = cut
        self.documents = documents
        self.lengths = joined([part.lengths for part in parts])
        self.prompts = self._column("prompt")

    def _column(self, name: str) -> NDArray[np.int64]:
        return joined([part.columns[name] for part in self.parts if len(part)])

    def write(self, folder: Path, share: tuple[float, float]) -> dict[str, Any]:
        size = len(self.lengths) // self.documents
        chosen = _members(share_of(size, share, self.cut.seed), self.documents)
        units, found = self._kept(chosen)
        laid, each, cut_answers = units, self.documents, 0
        if self.mismatched:
            laid, cut_answers = with_mismatched(
                units, self.prompts[units.document], max_length=self.cut.max_length
            )
            each = PIECES
        sizes = laid.length.reshape(-1, each).sum(axis=1)
        capacity = (self.documents + self.mismatched) * self.cut.max_length
        if self.cut.pack:
            order, bounds = packing.grouped(packing.best_fit(sizes, capacity=capacity))
        else:
            order, bounds = np.arange(len(sizes)), np.arange(len(sizes) + 1)
        laid = laid.take(_members(order, each))
        first = np.arange(len(laid)) % each == 0
        write_plan(folder, laid, bounds * each, first.astype(np.int64))
        pieces = units.take(_members(order, self.documents))
        trained = trained_counts(self.parts, pieces)
        add_source_counts(found, self.parts, chosen, pieces, trained)
        tokens, count = int(laid.length.sum()), len(bounds) - 1
        return {
            **{name: sum(one[name] for one in found) for name in (*COUNTS, "bad")},
            **self._labels(pieces),
            **({"mismatched_cut": cut_answers} if self.mismatched else {}),
            "duplicates": duplicates(self.parts, chosen),
            "samples": count,
            "tokens": tokens,
            "trained_tokens": int(trained.sum()),
            "fill_rate": tokens / (count * capacity) if count else 0.0,
            "max_length": self.cut.max_length,
            "sources": found,
        }

    def _kept(self, chosen: NDArray[np.int64]) -> tuple[packing.Pieces, list[dict[str, Any]]]:
        """(the documents of the units that stay, cut, in order; of each source, what became of the
        others). chosen: the documents of all units, ascending."""
        stay, found = [packing.whole(self.lengths, chosen[:0])], []
        for source, part, mine in zip(
            self.sources, self.parts, by_source(self.parts, chosen), strict=True
        ):
            kept, counts = self._kept_of(source, packing.whole(self.lengths, mine))
            stay.append(kept)
            found.append({**source_facts(source, part), **counts})
        return packing.joined(stay), found

    def _kept_of(
        self, source: SourceDocuments, pieces: packing.Pieces
    ) -> tuple[packing.Pieces, dict[str, int]]:
        policy = source.long_samples
        units = len(pieces) // self.documents
        trained = self._each(trained_counts(self.parts, pieces) > 0)
        pieces = pieces.take(np.repeat(trained, self.documents))
        long = ~self._each(pieces.length <= self.cut.max_length)
        if long.any() and policy == "error":
            raise self._too_long(pieces, long)
        if policy in ("truncate_left", "truncate_right"):
            pieces, stays = self._truncated(pieces, policy)
        else:
            stays = ~long
        kept = pieces.take(np.repeat(stays, self.documents))
        lost = int((long & ~stays).sum())
        cut = policy != "drop"
        return kept, {
            "documents": units,
            "untrained": units - int(trained.sum()),
            "long": int(long.sum()),
            "cut_to_nothing": lost if cut else 0,
            "truncated": int((long & stays).sum()) if cut else 0,
            "split": 0,
            "dropped": units - int(stays.sum()),
        }

    def _truncated(
        self, pieces: packing.Pieces, policy: LongSamples
    ) -> tuple[packing.Pieces, NDArray[np.bool_]]:
        """(the pieces, at most `max_length` long; which units are still worth training)."""
        most, count = self.cut.max_length, self.documents
        excess = np.maximum(pieces.length - most, 0)
        whole = self._each(excess == 0)
        if policy == "truncate_left":
            # the prompt stays the same for both, and something of it must be left
            start = np.repeat(excess.reshape(-1, count).max(axis=1), count)
            stays = np.logical_or(self._each(start < self.prompts[pieces.document]), whole)
            length = np.maximum(pieces.length - start, 1)
            return packing.Pieces(pieces.document, start, length), stays
        cut = packing.Pieces(pieces.document, pieces.start, np.minimum(pieces.length, most))
        stays = self._each(trained_counts(self.parts, cut) > 0)
        if count > 1:
            for unit in np.flatnonzero(stays & ~whole):
                answers = {self._tokens(cut, count * int(unit) + n).tobytes() for n in range(count)}
                stays[unit] = len(answers) == count
        return cut, stays

    def _each(self, holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """For each unit whether something holds for each of its documents."""
        every: NDArray[np.bool_] = np.all(holds.reshape(-1, self.documents), axis=1)
        return every

    def _tokens(self, pieces: packing.Pieces, piece: int) -> NDArray[np.int32]:
        part, document = self._where(int(pieces.document[piece]))
        begin = int(part.offsets[document] + pieces.start[piece])
        return part.tokens[begin : begin + int(pieces.length[piece])]

    def _where(self, document: int) -> tuple[Documents, int]:
        for part in self.parts:
            if document < len(part):
                return part, document
            document -= len(part)
        raise IndexError(document)

    def _labels(self, pieces: packing.Pieces) -> dict[str, int]:
        """How many pairs or rankings there are, or how many of the answers are wanted."""
        if self.documents == 2:
            return {"pairs": len(pieces) // 2}
        if self.documents > 2:
            return {"rankings": len(pieces) // self.documents, "answers": self.documents}
        wanted = int(self._column("desirable")[pieces.document].sum())
        return {"desirable": wanted, "undesirable": len(pieces) - wanted}

    def _too_long(self, pieces: packing.Pieces, long: NDArray[np.bool_]) -> RecipeError:
        longest = int(np.argmax(pieces.length))
        part, document = self._where(int(pieces.document[longest]))
        what = {1: "answers", 2: "pairs"}.get(self.documents, "rankings")
        return RecipeError(
            Problem(
                f"{int(long.sum()):,} {what} are longer than {self.cut.max_length:,} tokens, the "
                f"longest ({part.place(document)}) has {int(pieces.length[longest]):,}",
                place="data.max_length",
                hint="raise it, or set data.long_samples: drop, truncate_left or truncate_right",
            )
        )


def _members(units: NDArray[np.int64], documents: int) -> NDArray[np.int64]:
    """The documents of units, unit after unit."""
    return (units[:, None] * documents + np.arange(documents)).reshape(-1)
