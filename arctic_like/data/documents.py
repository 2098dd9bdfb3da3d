"""Tokenised documents on disk: flat arrays that are mapped, not read.

    tokens.bin      int32, all documents one after another
    trained.bin     uint8, 1 where a token is trained
    offsets.bin     int64, n + 1: where each document begins in both
    places.bin      utf-8: where each document comes from
    places_at.bin   int64, n + 1: where each place begins
    column-*.bin    int64, n: what else an encoder says of each document

Memory stays flat however large they are, and a worker process gets them by path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

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


class DocumentWriter:
    """Writes documents into an empty folder, as they come."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = ("tokens", "trained", "offsets", "places", "places_at")
        self._files: dict[str, BinaryIO] = {
            name: (folder / f"{name}.bin").open("wb") for name in names
        }
        self.documents = self.tokens = self.trained = self._place_bytes = 0
        self._write("offsets", np.zeros(1, dtype=np.int64))
        self._write("places_at", np.zeros(1, dtype=np.int64))

    def add(
        self,
        places: Sequence[str],
        lengths: Any,
        tokens: Any,
        trained: Any,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Append documents.

        places: where each comes from. lengths: tokens of each. tokens, trained: those of all, flat.
        columns: further values, one a document; the same names at every call.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        tokens = np.asarray(tokens, dtype=np.int32)
        trained = np.asarray(trained, dtype=np.uint8)
        if (
            lengths.sum() != len(tokens)
            or len(tokens) != len(trained)
            or len(lengths) != len(places)
        ):
            raise ValueError("documents, lengths, tokens and masks do not match")
        encoded = [place.encode() for place in places]
        ends = self._place_bytes + np.cumsum([len(place) for place in encoded], dtype=np.int64)
        self._write("tokens", tokens)
        self._write("trained", trained)
        self._write("offsets", self.tokens + np.cumsum(lengths))
        self._files["places"].write(b"".join(encoded))
        self._write("places_at", ends)
        for name, values in (columns or {}).items():
            if f"column-{name}" not in self._files:
                self._files[f"column-{name}"] = (self._folder / f"column-{name}.bin").open("wb")
            self._write(f"column-{name}", np.asarray(values, dtype=np.int64))
        self.documents += len(places)
        self.tokens += len(tokens)
        self.trained += int(trained.sum())
        self._place_bytes = int(ends[-1]) if len(ends) else self._place_bytes

    def close(self) -> None:
        """Bring everything to the disk."""
        for file in self._files.values():
            file.close()

    def _write(self, name: str, array: NDArray[Any]) -> None:
        self._files[name].write(array.tobytes())


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
