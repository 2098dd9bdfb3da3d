"""Samples as views of documents on disk: each is one or several pieces, laid one after another."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arctic_like.data.base import Sample, SampleSet
from arctic_like.data.packing import IGNORED, Pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from arctic_like.data.documents import Documents

_ARRAYS = ("document", "start", "length", "offsets", "lengths", "weights")
_NAMED = 3


def write_plan(
    folder: Path, pieces: Pieces, offsets: NDArray[np.int64], weights: NDArray[np.int64]
) -> None:
    """Save which pieces make up which sample.

    offsets: (samples + 1), into `pieces`. weights: labels of each piece.
    """
    arrays = {
        "document": pieces.document,
        "start": pieces.start,
        "length": pieces.length,
        "offsets": offsets,
        "lengths": _sums(pieces.length, offsets),
        "weights": _sums(weights, offsets),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array, dtype=np.int64))


def _sums(values: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=total[1:])
    sums: NDArray[np.int64] = total[offsets[1:]] - total[offsets[:-1]]
    return sums


class DocumentSamples(SampleSet):
    """The samples that a plan makes of documents. Pickled by path; arrays are mapped.

    documents: the sources' folders one after another; a document's number counts through all of
    them.
    """

    def __init__(self, folder: Path, documents: Sequence[Documents]) -> None:
        self.folder = folder
        self.documents = list(documents)
        self._open()

    def _open(self) -> None:
        arrays = {
            name: np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))
            for name in _ARRAYS
        }
        self.pieces = Pieces(arrays["document"], arrays["start"], arrays["length"])
        self.offsets: NDArray[np.int64] = arrays["offsets"]
        self.lengths = arrays["lengths"]
        self.weights = arrays["weights"]
        self._firsts = [0, *accumulate(len(part) for part in self.documents)]

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "documents": self.documents}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.lengths)

    def _where(self, piece: int) -> tuple[Documents, int]:
        document = int(self.pieces.document[piece])
        part = bisect_right(self._firsts, document) - 1
        return self.documents[part], document - self._firsts[part]

    def _bounds(self, index: int) -> range:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return range(int(self.offsets[index]), int(self.offsets[index + 1]))

    def __getitem__(self, index: int) -> Sample:
        length = int(self.lengths[index]) if 0 <= index < len(self) else 0
        input_ids = np.empty(length, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        position_ids = np.empty(length, dtype=np.int64)
        at = 0
        for piece in self._bounds(index):
            part, document = self._where(piece)
            first = int(part.offsets[document]) + int(self.pieces.start[piece])
            size = int(self.pieces.length[piece])
            here = slice(at, at + size)
            tokens = part.tokens[first : first + size]
            input_ids[here] = tokens
            np.copyto(labels[here], tokens, where=part.trained[first : first + size].view(bool))
            labels[at] = IGNORED  # nothing inside the document predicts its first token
            position_ids[here] = np.arange(size)
            at += size
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}

    def sample_id(self, index: int) -> str:
        """Places of the sample's first documents: "train.jsonl:17, train.jsonl:4 … +5"."""
        bounds = self._bounds(index)
        named = [self._place(piece) for piece in bounds[:_NAMED]]
        more = len(bounds) - len(named)
        return ", ".join(named) + (f" … +{more}" if more else "")

    def places(self, index: int) -> list[str]:
        """Where each document comes from, and from which of its tokens on: "train.jsonl:17@512"."""
        return [self._place(piece) for piece in self._bounds(index)]

    def entries(self) -> list[Path]:
        """The folder of the plan, then those of the documents."""
        return [self.folder, *(part.folder for part in self.documents)]

    def _place(self, piece: int) -> str:
        part, document = self._where(piece)
        start = int(self.pieces.start[piece])
        return part.place(document) + (f"@{start}" if start else "")
