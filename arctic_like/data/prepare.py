"""One source → documents in the cache; several sources → the samples of one set, in the cache too.

Documents are cached uncut under what shapes their tokens (content, tokenizer, template, masks),
samples under the documents' keys and what shapes them (length, policy, packing). Another
`max_length` thus tokenises nothing again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data import cache, packing
from arctic_like.data.base import DataSource, LongSamples, ReadRow
from arctic_like.data.documents import Documents, DocumentWriter
from arctic_like.data.encode import Encoder, encoded
from arctic_like.data.order import key_of, permute
from arctic_like.data.samples import DocumentSamples, write_plan
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
"""Part of every key; goes up when the same rows would become other tokens or samples."""

_KEEP = {"drop": "drop", "truncate_left": "end", "truncate_right": "start", "split": "split"}
_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Store:
    """Where prepared data lies, and how it is prepared."""

    root: Path
    num_proc: int = 1
    missing_ok: bool = True


def documents(
    source: DataSource, *, shape: dict[str, Any], encoder: Callable[[], Encoder], store: Store
) -> Path:
    """The cached documents of a source.

    shape: all that shapes the tokens besides the source. encoder: made only if they are not there
    yet.
    """
    config = source.config
    chosen = {
        "ratio": config.sample_ratio,
        "count": config.sample_count,
        "seed": config.sample_seed,
    }
    columns = {
        "roles": list(config.role_mapping.items()), "content": config.content_key,
        "column": config.column, "kwargs": repr(sorted(config.kwargs.items())),
    }  # fmt: skip
    content = source.content_key()
    key = cache.key_of([VERSION, content, chosen if drawn(source) else None, columns, shape])

    def prepare(folder: Path) -> dict[str, Any]:
        return _write_documents(folder, source, encoder(), num_proc=store.num_proc)

    return cache.obtain(
        store.root / "documents", key, prepare, missing_ok=store.missing_ok, what=source.describe()
    )


def drawn(source: DataSource) -> bool:
    """Whether only some of a source's rows are read."""
    return source.config.sample_ratio is not None or source.config.sample_count is not None


def chosen_rows(source: DataSource) -> Iterator[ReadRow]:
    """The rows of a source, or those that `sample_ratio` or `sample_count` draws, in their order.

    Raises RecipeError where more are asked for than there are.
    """
    if not drawn(source):
        yield from source.rows()
        return
    config = source.config
    total = sum(1 for _ in source.rows())
    count = config.sample_count or round((config.sample_ratio or 0.0) * total)
    if count > total:
        raise RecipeError(
            Problem(
                f"is {count:,}, but {source.describe()} has {total:,} rows",
                place="sample_count",
                hint="lower it, or leave it out to read all",
            )
        )
    wanted = np.zeros(total, dtype=bool)
    if count:
        wanted[permute(np.arange(count), size=total, key=key_of(config.sample_seed))] = True
    yield from (row for take, row in zip(wanted, source.rows(), strict=True) if take)


def _write_documents(
    folder: Path, source: DataSource, encoder: Encoder, *, num_proc: int
) -> dict[str, Any]:
    from loguru import logger

    writer = DocumentWriter(folder)
    counts: Counter[str] = Counter()
    started = told = time.monotonic()
    for batch in encoded(chosen_rows(source), encoder, num_proc=num_proc):
        if batch.bad:
            raise batch.bad[0].error()
        writer.add(batch.places, batch.lengths, batch.tokens, batch.trained, batch.columns)
        counts.update(batch.counts)
        if time.monotonic() - told > _REPORT_SECONDS:
            told = time.monotonic()
            rate = writer.tokens / (told - started)
            logger.info(
                f"tokenising {source.describe()}: {writer.documents:,} rows, "
                f"{writer.tokens:,} tokens, {rate:,.0f} tokens/s"
            )
    writer.close()
    return {
        "source": source.describe(),
        "documents": writer.documents,
        "tokens": writer.tokens,
        "trained_tokens": writer.trained,
        **counts,
    }


@dataclass(frozen=True)
class Cut:
    """How documents become samples."""

    max_length: int
    long_samples: LongSamples
    pack: bool
    fill: bool
    seed: int


@dataclass
class Prepared:
    """One set, ready to read, and what became of its documents (`facts`)."""

    samples: DocumentSamples
    facts: dict[str, Any] = field(default_factory=dict)


def samples(
    entries: list[Path], cut: Cut, *, store: Store, share: tuple[float, float] = (0.0, 1.0)
) -> Prepared:
    """The samples of a set from its sources' documents.

    share: the part of all documents that belongs to the set, in a keyed random order
    (`train_eval_split`). Raises RecipeError where nothing is left, or a document is too long under
    `error`.
    """
    parts = [Documents(entry) for entry in entries]
    key = cache.key_of([VERSION, [entry.name for entry in entries], repr(cut), list(share)])

    def prepare(folder: Path) -> dict[str, Any]:
        return _write_samples(folder, parts, cut, share)

    entry = cache.obtain(
        store.root / "samples", key, prepare, missing_ok=store.missing_ok, what="the packed data"
    )
    return Prepared(DocumentSamples(entry, parts), cache.facts(entry))


def _write_samples(
    folder: Path, parts: list[Documents], cut: Cut, share: tuple[float, float]
) -> dict[str, Any]:
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(part.lengths for part in parts)])
    pieces, facts = _kept(parts, packing.whole(lengths, _share(len(lengths), share, cut.seed)), cut)
    pieces, offsets = _arranged(pieces, cut)
    weights = _weights(parts, pieces)
    write_plan(folder, pieces, offsets, weights)
    tokens, count = int(pieces.length.sum()), len(offsets) - 1
    return {
        **facts,
        "samples": count,
        "tokens": tokens,
        "trained_tokens": int(weights.sum()),
        "fill_rate": tokens / (count * cut.max_length) if count else 0.0,
        "max_length": cut.max_length,
    }


def _kept(
    parts: list[Documents], pieces: packing.Pieces, cut: Cut
) -> tuple[packing.Pieces, dict[str, int]]:
    """The documents that stay, long ones cut, and how many did not.

    documents: all there were. untrained: had no trained token. long: more tokens than `max_length`;
    truncated: those of them that stayed, cut. cut_to_nothing: kept no trained token. dropped: all
    that are not in the set.
    """
    documents = len(pieces)
    trained = _weights(parts, pieces) > 0
    pieces = pieces.take(trained)
    long = int((pieces.length > cut.max_length).sum())
    if long and cut.long_samples == "error":
        raise _too_long(parts, pieces, cut.max_length)
    pieces = packing.cut(
        pieces, max_length=cut.max_length, keep=_KEEP.get(cut.long_samples, "drop")
    )
    before = len(np.unique(pieces.document))
    pieces = pieces.take(_weights(parts, pieces) > 0)
    stayed = len(np.unique(pieces.document))
    return pieces, {
        "documents": documents,
        "untrained": documents - int(trained.sum()),
        "long": long,
        "cut_to_nothing": before - stayed,
        "truncated": 0 if cut.long_samples == "drop" else long - (before - stayed),
        "dropped": documents - stayed,
    }


def _share(size: int, share: tuple[float, float], seed: int) -> NDArray[np.int64]:
    """The documents of a share, ascending. Shares that touch have no document in common."""
    if share == (0.0, 1.0):
        return np.arange(size, dtype=np.int64)
    first, last = (round(bound * size) for bound in share)
    return np.sort(permute(np.arange(first, last), size=size, key=key_of(seed, 1)))


def _arranged(pieces: packing.Pieces, cut: Cut) -> tuple[packing.Pieces, NDArray[np.int64]]:
    """(pieces, offsets): the pieces in the order of the samples, and where each sample begins."""
    if not cut.pack:
        return pieces, np.arange(len(pieces) + 1, dtype=np.int64)
    if cut.fill:
        order = permute(np.arange(len(pieces)), size=len(pieces), key=key_of(cut.seed, 2))
        return packing.end_to_end(pieces.take(order), capacity=cut.max_length)
    order, offsets = packing.grouped(packing.best_fit(pieces.length, capacity=cut.max_length))
    return pieces.take(order), offsets


def _weights(parts: list[Documents], pieces: packing.Pieces) -> NDArray[np.int64]:
    """Trained labels of each piece."""
    weights = np.zeros(len(pieces), dtype=np.int64)
    first = 0
    for part in parts:
        own = (pieces.document >= first) & (pieces.document < first + len(part))
        mine = pieces.take(own)
        weights[own] = part.trained_counts(mine.document - first, mine.start, mine.length)
        first += len(part)
    return weights


def _too_long(parts: list[Documents], pieces: packing.Pieces, max_length: int) -> RecipeError:
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
