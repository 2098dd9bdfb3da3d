"""Streaming: rows cut into blocks, each tokenised, packed and shuffled by itself.

    state of block n ─→ rows of each source (its quota, from its cursor) ─→ documents ─→ samples
                    └─→ state of block n + 1

A state is all that a block depends on beside the recipe: constant in size, the same on every rank, and
what a checkpoint keeps. A block lies in a folder of the run, `stream/block-n/`, from before it is
needed until it was passed; one that is gone is made again from its state, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.data import cache
from arctic_like.data.base import BadRow, Cursor, DataSource, OnBadSample, Row
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.data.encode import Encoder
    from arctic_like.data.prepare import Prepared
    from arctic_like.data.tokenise import Store

VERSION = 1
"""Part of every block's key; goes up when the same rows would become other documents."""


@dataclass(frozen=True)
class SourceState:
    """Where a block's rows begin in a source.

    cursor: None at its first row. passes: how often it was read to its end. rows, tokens: that came
    of it so far, over all passes; tokens are counted before anything is cut. ended: in a stream
    without weights, until the other sources end too.
    """

    cursor: Cursor | None = None
    passes: int = 0
    rows: int = 0
    tokens: int = 0
    ended: bool = False


@dataclass(frozen=True)
class StreamState:
    """Where a block begins. samples: that came in the blocks before it."""

    block: int
    samples: int
    sources: tuple[SourceState, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> StreamState:
        """What `as_dict` gave."""
        sources = tuple(SourceState(**source) for source in content["sources"])
        return cls(content["block"], content["samples"], sources)


def quotas(
    state: StreamState, *, window: int, weights: Sequence[float] | None = None,
    by_token: bool = False,
) -> list[int]:  # fmt: skip
    """Rows that a block takes from each source; they add up to `window`.

    Without weights every source that has not ended gives as many as the others. With weights, all
    rows (or tokens) so far and those of this block together come as near to the shares as can be:
    a source that is behind catches up. How many tokens the block's rows have is estimated from those
    before.
    """
    sources = state.sources
    if weights is None:
        live = [number for number, source in enumerate(sources) if not source.ended]
        # what does not divide evenly goes to other sources in every block
        turn = state.block % len(live)
        first = live[turn:] + live[:turn]
        even, rest = divmod(window, len(live))
        found = [0] * len(sources)
        for place, number in enumerate(first):
            found[number] = even + (place < rest)
        return found
    size = [s.tokens / s.rows if by_token and s.rows and s.tokens else 1.0 for s in sources]
    if by_token:
        known = [one for one, s in zip(size, sources, strict=True) if s.rows and s.tokens]
        mean = sum(known) / len(known) if known else 1.0
        size = [one if s.rows and s.tokens else mean for one, s in zip(size, sources, strict=True)]
    used = [s.rows * one for s, one in zip(sources, size, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    return _rounded(_filled(used, shares, size, window), window)


def _filled(used: list[float], shares: list[float], size: list[float], window: int) -> list[float]:
    """Rows of each source so that `used` plus theirs stand in `shares`, none negative.

    The level λ that satisfies Σ max(0, (share · λ - used) / size) = window, found where the sources
    that are below it are known (water filling).
    """
    order = sorted(range(len(used)), key=lambda one: used[one] / shares[one])
    rate = taken = level = 0.0
    for place, one in enumerate(order):
        rate += shares[one] / size[one]
        taken += used[one] / size[one]
        level = (window + taken) / rate
        following = order[place + 1 : place + 2]
        if all(level <= used[other] / shares[other] for other in following):
            break
    return [max(0.0, (p * level - u) / m) for p, u, m in zip(shares, used, size, strict=True)]


def _rounded(wanted: list[float], window: int) -> list[int]:
    """Whole numbers that add up to `window` (largest remainders, ties to the first)."""
    parts = [int(one) for one in wanted]
    most = sorted(range(len(parts)), key=lambda one: parts[one] - wanted[one])
    for place in range(window - sum(parts)):
        parts[most[place % len(most)]] += 1
    return parts


class FollowedRows:
    """Some rows of a source from a cursor on, and where they end.

    endless: begin again at its end. Else fewer rows than `count` may come, and `ended` says so.
    skip: rows that cannot be read are counted in `bad`, with the first few in `bad_examples`, instead
    of ending everything. Raises RecipeError for a source without a row.
    """

    def __init__(
        self, source: DataSource, state: SourceState, count: int, *, endless: bool, skip: bool
    ) -> None:
        self._source = source
        self._count = count
        self._endless = endless
        self._skip = skip
        self.cursor = state.cursor
        self.passes = state.passes
        self.rows = 0
        self.ended = False
        self.bad = 0
        self.bad_examples: list[str] = []

    def __iter__(self) -> Iterator[Row]:
        while True:
            begin, before = self.cursor, self.rows
            for cursor, place, row in self._source.rows_from(self.cursor):
                self.cursor = cursor
                self.rows += 1
                if isinstance(row, BadRow):
                    self.refuse(row)
                else:
                    yield place, row
                if self.rows == self._count:
                    return
            if begin is None and self.rows == before:
                raise RecipeError(
                    Problem(
                        f"holds no row ({self._source.describe()})", place="data.sources",
                        hint="check the path and the split",
                    )
                )  # fmt: skip
            if not self._endless:
                self.ended = True
                return
            self.cursor = None
            self.passes += 1

    def refuse(self, row: BadRow) -> None:
        """Count a row that cannot be used, or raise its error."""
        if not self._skip:
            raise row.error()
        self.bad += 1
        if len(self.bad_examples) < 3:
            self.bad_examples.append(str(row.error()))


@dataclass(frozen=True)
class StreamedSource:
    """A source with what makes documents of its rows. title: its name in reports. shape: all that
    shapes documents."""

    title: str
    source: DataSource
    encoder: Callable[[], Encoder]
    shape: dict[str, Any]
    on_bad_sample: OnBadSample = "error"

    def identity(self) -> list[Any]:
        """Differs where the same rows would become other documents."""
        config = self.source.config
        stated = config.model_dump(mode="json", exclude={"label", "weight", "repeat"})
        return [VERSION, stated, self.shape, self.on_bad_sample]


@dataclass(frozen=True)
class BlockMaker:
    """How blocks are made.

    folder: of the run. window: rows of a block. weights, by_token: see `quotas`. samples: a factory's
    way from documents to samples, given (source, entry of documents) of each and a store.
    """

    folder: Path
    sources: tuple[StreamedSource, ...]
    samples: Callable[[list[tuple[int, Path]], Store], Prepared]
    window: int
    num_proc: int = 1
    weights: tuple[float, ...] | None = None
    by_token: bool = False

    @property
    def first(self) -> StreamState:
        """Where a run begins."""
        return StreamState(0, 0, tuple(SourceState() for _ in self.sources))

    def parts(self, state: StreamState) -> list[tuple[int, int, Path]]:
        """(source, rows, entry of documents) of everything that a block takes."""
        counts = quotas(state, window=self.window, weights=self.weights, by_token=self.by_token)
        folder = self.block_folder(state.block) / "documents"
        found = []
        for number, count in enumerate(counts):
            if count:
                identity = self.sources[number].identity()
                key = [identity, asdict(state.sources[number]), count, self._endless]
                found.append((number, count, folder / cache.key_of(key)))
        return found

    def block_folder(self, block: int) -> Path:
        """Where a block lies."""
        return self.folder / f"block-{block}"

    @property
    def _endless(self) -> bool:
        return self.weights is not None or len(self.sources) == 1

    def make(self, state: StreamState) -> None:
        """Make a block, unless it is there. Raises what is wrong with its rows; whoever waits for its
        entries learns of that too."""
        for number, count, entry in self.parts(state):
            write = partial(self._write, number=number, state=state.sources[number], count=count)
            what = f"block {state.block} of {self.sources[number].title}"
            cache.obtain(entry.parent, entry.name, write, what=what)
        self.prepared(state)

    def prepared(self, state: StreamState) -> tuple[Prepared | None, list[int]]:
        """(the samples of a block whose documents are there, None of no document; the sources of
        their folders)."""
        from arctic_like.data.tokenise import Store

        parts = [(n, entry) for n, _, entry in self.parts(state)]
        if not sum(cache.facts(entry)["documents"] for _, entry in parts):
            return None, []
        store = Store(self.block_folder(state.block))
        return self.samples(parts, store), [n for n, _ in parts]

    def following(self, state: StreamState, samples: int) -> StreamState:
        """Where the next block begins. samples: of this one, whose documents are there."""
        sources = list(state.sources)
        for number, _, entry in self.parts(state):
            facts, before = cache.facts(entry), sources[number]
            sources[number] = SourceState(
                facts["cursor"], facts["passes"], before.rows + facts["rows"],
                before.tokens + facts["tokens"], facts["ended"],
            )  # fmt: skip
        if all(source.ended for source in sources):
            if not any(source.rows for source in sources):
                raise RecipeError(
                    Problem("hold no row", place="data.sources", hint="check paths and splits")
                )
            sources = [replace(s, cursor=None, passes=s.passes + 1, ended=False) for s in sources]
        return StreamState(state.block + 1, state.samples + samples, tuple(sources))

    def _write(self, folder: Path, number: int, state: SourceState, count: int) -> dict[str, Any]:
        from arctic_like.data.documents import DocumentWriter
        from arctic_like.data.encode import encoded

        one = self.sources[number]
        rows = FollowedRows(
            one.source, state, count, endless=self._endless, skip=one.on_bad_sample == "skip"
        )
        writer = DocumentWriter(folder)
        counts: Counter[str] = Counter()
        for batch in encoded(rows, one.encoder(), num_proc=self.num_proc):
            for bad in batch.bad:
                rows.refuse(bad)
            writer.add(
                batch.places, batch.lengths, batch.tokens, batch.trained, batch.columns,
                batch.digests,
            )  # fmt: skip
            counts.update(batch.counts)
        writer.close()
        return {
            **counts,
            "source": one.title,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "trained_tokens": writer.trained,
            "bad": rows.bad,
            "bad_examples": rows.bad_examples,
            "rows": rows.rows,
            "cursor": rows.cursor,
            "passes": rows.passes,
            "ended": rows.ended,
        }
