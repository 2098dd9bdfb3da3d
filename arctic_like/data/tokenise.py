"""One source → documents in the cache, uncut: by several processes, and from where it was
interrupted.

Every few million tokens all that was written is brought to the disk and noted: how many rows it
came from, how long each file is. The next attempt cuts the files to what was noted, passes over
those rows, and goes on; since rows come in one order, it ends with the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from arctic_like.data import cache, hashes
from arctic_like.data.base import BadRow, DataSource, OnBadSample, ReadRow
from arctic_like.data.documents import DocumentWriter, Written
from arctic_like.data.encode import Encoded, Encoder, encoded
from arctic_like.data.order import key_of, permute
from arctic_like.data.showing import progress_of
from arctic_like.data.workers import cores
from arctic_like.errors import Problem, RecipeError

_SAVE_TOKENS = 1 << 22
_SAVE_ROWS = 1 << 16
_EXAMPLES = 3
_MOST_PROCESSES = 32
"""One process reads, hands out and writes for all others, and is busy with about so many."""


@dataclass(frozen=True)
class Store:
    """Where prepared data lies, and how it is prepared.

    num_proc: processes that tokenise; 0 is one for each core.
    """

    root: Path
    num_proc: int = 0
    missing_ok: bool = True
    on_bad_sample: OnBadSample = "error"

    @property
    def processes(self) -> int:
        """`num_proc`, or what it stands for."""
        return self.num_proc or min(cores(), _MOST_PROCESSES)


def documents(
    source: DataSource, *, shape: dict[str, Any], encoder: Callable[[], Encoder], store: Store
) -> Path:
    """The cached documents of a source.

    shape: all that shapes the tokens besides the source. encoder: made only if they are not there
    yet. Raises RecipeError at the first row that cannot be used, unless such rows are to be skipped.
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
    hashes.forget_seen()
    content = source.content_key()
    key = cache.key_of([cache.VERSION, content, chosen if drawn(source) else None, columns, shape])
    skip = (config.on_bad_sample or store.on_bad_sample) == "skip"

    def prepare(folder: Path) -> dict[str, Any]:
        facts = _Preparation(folder, source, skip=skip).run(encoder(), processes=store.processes)
        hashes.refuse_changes()
        return facts

    entry = cache.obtain(
        store.root / "documents", key, prepare, missing_ok=store.missing_ok, what=source.describe()
    )
    if not skip:
        # it may have been made where bad rows are skipped
        _refuse(cache.facts(entry)["bad_examples"])
    return entry


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


def _expected(source: DataSource) -> int | None:
    """About how many rows `chosen_rows` gives, if that is known."""
    total, config = source.expected_rows(), source.config
    if total is None or config.sample_count is not None:
        return config.sample_count
    return round(total * (config.sample_ratio or 1.0))


@dataclass
class _Done:
    """How far a preparation is. rows: that were looked at, in order. bad: of them, those that could
    not be used; bad_examples: the first few, as `BadRow`s."""

    rows: int = 0
    bad: int = 0
    bad_examples: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=lambda: asdict(Written()))


class _Preparation:
    """The documents of one source on their way into a folder, which may hold the first of them."""

    def __init__(self, folder: Path, source: DataSource, *, skip: bool) -> None:
        self._folder = folder
        self._source = source
        self._skip = skip
        noted = cache.progress(folder)
        self._done = _Done(**noted) if noted else _Done()
        written = Written(**self._done.written) if noted else None
        if not skip:
            _refuse(self._done.bad_examples)
        self._writer = DocumentWriter(folder, written)
        self._counts = Counter(self._done.counts)
        self._saved = (self._done.rows, self._writer.tokens)

    def run(self, encoder: Encoder, *, processes: int) -> dict[str, Any]:
        """Tokenise what is left. Returns the facts of all documents."""
        from loguru import logger

        done, writer = self._done, self._writer
        if done.rows:
            logger.info(f"{self._source.describe()}: going on after row {done.rows:,}")
        rows = islice(chosen_rows(self._source), done.rows, None)
        batches = encoded(rows, encoder, num_proc=processes)
        title = f"tokenising {self._source.describe()}"
        with closing(batches), progress_of(title, _expected(self._source)) as shown:
            for batch in batches:
                self._take(batch)
                shown.update(done.rows, writer.tokens)
        writer.close()
        return {
            "source": self._source.describe(),
            "documents": writer.documents,
            "tokens": writer.tokens,
            "trained_tokens": writer.trained,
            "rows": done.rows,
            "bad": done.bad,
            "bad_examples": done.bad_examples,
            **self._counts,
        }

    def _take(self, batch: Encoded) -> None:
        done, writer = self._done, self._writer
        examples = [asdict(bad) for bad in batch.bad[:_EXAMPLES]]
        if not self._skip:
            _refuse(examples)
        writer.add(
            batch.places, batch.lengths, batch.tokens, batch.trained, batch.columns, batch.digests
        )
        done.rows += batch.rows
        done.bad += len(batch.bad)
        done.bad_examples += examples[: _EXAMPLES - len(done.bad_examples)]
        self._counts.update(batch.counts)
        rows, tokens = self._saved
        if done.rows - rows >= _SAVE_ROWS or writer.tokens - tokens >= _SAVE_TOKENS:
            self._save()

    def _save(self) -> None:
        self._done.counts = dict(self._counts)
        self._done.written = asdict(self._writer.saved())
        cache.note_progress(self._folder, asdict(self._done))
        self._saved = (self._done.rows, self._writer.tokens)


def _refuse(examples: list[dict[str, Any]]) -> None:
    """Raise the error of the first bad row, if there is one."""
    if not examples:
        return
    error = BadRow(**examples[0]).error()
    problem = error.problems[0]
    way_out = "data.on_bad_sample: skip leaves such rows out"
    hint = f"{problem.hint}; {way_out}" if problem.hint else way_out
    raise RecipeError(
        Problem(problem.message, place=problem.place, hint=hint, file=problem.file,
                line=problem.line)
    )  # fmt: skip
