"""Tokenised documents on disk: flat arrays that are mapped, not read.

    tokens.bin      int32, all documents one after another
    trained.bin     uint8, 1 where a token is trained
    offsets.bin     int64, n + 1: where each document begins in both
    places.bin      utf-8: where each document comes from
    places_at.bin   int64, n + 1: where each place begins
    digests.bin     uint64, n: xxh3 of each document's tokens
    column-*.bin    int64, n: what else an encoder says of each document

Memory stays flat however large they are, and a worker process gets them by path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from arctic_like.data.encode import token_digests
from arctic_like.errors import RunError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COUNT_TOKENS = 1 << 22
"""How many tokens are counted at once."""


def mapped(path: Path, dtype: Any) -> NDArray[Any]:
    """A read-only array over a file; an empty file, which cannot be mapped, is an empty array."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=dtype)
    # A plain view of the map: slices of np.memmap itself take five times as long.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


@dataclass
class Written:
    """How far a writer is; all that another needs to go on. tokens, trained: of all documents.
    place_bytes: utf-8 of all places. columns: their names."""

    documents: int = 0
    tokens: int = 0
    trained: int = 0
    place_bytes: int = 0
    columns: list[str] = field(default_factory=list)

    def sizes(self) -> dict[str, int]:
        """File → its bytes."""
        each = {"offsets": 8 * (self.documents + 1), "places_at": 8 * (self.documents + 1)}
        each |= {"tokens": 4 * self.tokens, "trained": self.tokens, "places": self.place_bytes}
        each |= {"digests": 8 * self.documents}
        return each | {f"column-{name}": 8 * self.documents for name in self.columns}


class DocumentWriter:
    """Writes documents into a folder, as they come.

    written: what stands there already and is to stay, as `saved` gave it; what was added later is
    cut off. By default the folder is empty. Raises RunError where less stands there.
    """

    def __init__(self, folder: Path, written: Written | None = None) -> None:
        self._folder = folder
        self.written = written or Written()
        self._files: dict[str, BinaryIO] = {}
        for name, size in self.written.sizes().items():
            self._files[name] = self._opened(name, size if written else 0)
        if written is None:
            self._write("offsets", np.zeros(1, dtype=np.int64))
            self._write("places_at", np.zeros(1, dtype=np.int64))

    def _opened(self, name: str, size: int) -> BinaryIO:
        path = self._folder / f"{name}.bin"
        path.touch()
        if path.stat().st_size < size:
            raise RunError(f"{path} is shorter than was noted\n    remove {self._folder}")
        os.truncate(path, size)
        return path.open("ab")

    def add(
        self,
        places: Sequence[str],
        lengths: Any,
        tokens: Any,
        trained: Any,
        columns: Mapping[str, Any] | None = None,
        digests: NDArray[np.uint64] | None = None,
    ) -> None:
        """Append documents.

        places: where each comes from. lengths: tokens of each. tokens, trained: those of all, flat.
        columns: further values, one a document; the same names at every call. digests: uint64, if
        they are known.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        tokens = np.asarray(tokens, dtype=np.int32)
        trained = np.asarray(trained, dtype=np.uint8)
        columns = columns or {}
        digests = token_digests(tokens, lengths) if digests is None else digests
        if not (lengths.sum() == len(tokens) == len(trained)) or any(
            len(one) != len(places) for one in (lengths, digests, *columns.values())
        ):
            raise ValueError("documents, lengths, tokens, masks and columns do not match")
        if not len(places):
            return
        written = self.written
        if not written.documents:
            written.columns = list(columns)
            self._files |= {f"column-{n}": self._opened(f"column-{n}", 0) for n in columns}
        if written.columns != list(columns):
            raise ValueError(f"columns {list(columns)} do not match {written.columns}")
        encoded = [place.encode() for place in places]
        ends = written.place_bytes + np.cumsum([len(place) for place in encoded], dtype=np.int64)
        self._write("tokens", tokens)
        self._write("trained", trained)
        self._write("offsets", written.tokens + np.cumsum(lengths))
        self._files["places"].write(b"".join(encoded))
        self._write("places_at", ends)
        self._write("digests", digests)
        for name, values in columns.items():
            self._write(f"column-{name}", np.asarray(values, dtype=np.int64))
        written.documents += len(places)
        written.tokens += len(tokens)
        written.trained += int(np.count_nonzero(trained))
        written.place_bytes = int(ends[-1])

    @property
    def documents(self) -> int:
        """Documents so far."""
        return self.written.documents

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self.written.tokens

    @property
    def trained(self) -> int:
        """Trained tokens so far."""
        return self.written.trained

    def saved(self) -> Written:
        """How far it is, after all of it has reached the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self.written

    def close(self) -> None:
        """Give everything to the system."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._files[name].write(np.ascontiguousarray(array).data)


class Documents:
    """The documents of one folder, mapped on first use; pickled as its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open()

    def _open(self) -> None:
        self.tokens = mapped(self.folder / "tokens.bin", np.int32)
        self.trained = mapped(self.folder / "trained.bin", np.uint8)
        self.offsets = mapped(self.folder / "offsets.bin", np.int64)
        self._places = mapped(self.folder / "places.bin", np.uint8)
        self._places_at = mapped(self.folder / "places_at.bin", np.int64)
        self.digests = mapped(self.folder / "digests.bin", np.uint64)
        self.columns: dict[str, NDArray[np.int64]] = {
            path.stem.removeprefix("column-"): mapped(path, np.int64)
            for path in sorted(self.folder.glob("column-*.bin"))
        }

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.folder = state["folder"]
        self._open()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64."""
        return np.diff(self.offsets)

    def place(self, document: int) -> str:
        """Where a document comes from: "train.jsonl:17"."""
        start, end = self._places_at[document], self._places_at[document + 1]
        return self._places[start:end].tobytes().decode()

    def trained_counts(
        self, documents: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Labels of each stretch of a document, int64: its trained tokens but for the first one.

        Counts a few million tokens at a time; the stretches may come in any order.
        """
        begin = self.offsets[documents] + starts + 1
        end = self.offsets[documents] + starts + np.maximum(lengths, 1)
        counts = np.empty(len(documents), dtype=np.int64)
        order = np.argsort(begin, kind="stable")
        at = 0
        while at < len(order):
            first = int(begin[order[at]])
            limit = at + int(np.searchsorted(begin[order[at:]], first + _COUNT_TOKENS))
            here = order[at:limit]
            last = int(end[here].max())
            sums = np.concatenate([[0], np.cumsum(self.trained[first:last], dtype=np.int64)])
            counts[here] = sums[end[here] - first] - sums[begin[here] - first]
            at = limit
        return counts
