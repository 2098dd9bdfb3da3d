"""Bytes of all tensors that are alive, by kind and place, and the most there were at once.

A storage is counted from the operation that returns it until nothing refers to it any more. Scratch space
inside a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Place = Literal["device", "host"]
DEVICE = "cpu:0"
"""The stand-in for a GPU: tensors "on" it are told from the host's ("cpu") by their index."""
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "communication")


@dataclass
class Storage:
    """One allocation."""

    size: int
    kind: str
    place: Place


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive at once in a place, and of what kinds they were."""

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    phase: str = ""


class Memory:
    """Counts storages.

    on_gpu: whether what lies on the CPU without an index is on the host of a GPU. vocabulary: tensors of
    this last dimension are logits.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.vocabulary: int | None = None
        self.phase, self._kind = "", "activations"
        self._storages: dict[int, Storage] = {}
        self._live: dict[Place, Counter[str]] = {"device": Counter(), "host": Counter()}
        self._total: dict[Place, int] = {"device": 0, "host": 0}
        self.peaks: dict[Place, Peak] = {"device": Peak(), "host": Peak()}

    @contextmanager
    def during(self, phase: str, kind: str) -> Iterator[None]:
        """Inside, new storages are of this kind."""
        before = self.phase, self._kind
        self.phase, self._kind = phase, kind
        try:
            yield
        finally:
            self.phase, self._kind = before

    def forget_peaks(self) -> None:
        """Begin anew with what is alive now."""
        self.peaks = {"device": Peak(), "host": Peak()}
        for place in self.peaks:
            self._compare(place)

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is known or of no device."""
        if tensor.device.type == "meta":  # DeepSpeed notes shapes with such
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._storages.get(key)
        if known is not None:
            if known.size != size:  # resized in place
                self._change(known, size - known.size)
                known.size = size
            return
        place: Place = "host" if self.on_gpu and tensor.device.index is None else "device"
        made = Storage(size, self._kind_of(tensor), place)
        self._storages[key] = made
        self._change(made, size)
        weakref.finalize(storage, self._forget, key)

    def hold(self, size: int, kind: str, *, place: Place) -> None:
        """Count memory that is there beside the tensors at every later peak: the peak so far grows by it."""
        before = self.peaks[place]
        kinds = {**before.kinds, kind: before.kinds.get(kind, 0) + size}
        self.peaks[place] = Peak(before.total + size, kinds, before.phase)

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Say what kind of thing a tensor's storage is."""
        found = self._storages.get(tensor.untyped_storage()._cdata)
        if found is None or found.kind == kind:
            return
        self._live[found.place][found.kind] -= found.size
        found.kind = kind
        self._live[found.place][kind] += found.size

    def live(self, place: Place) -> dict[str, int]:
        """Kind → bytes now."""
        return {kind: size for kind, size in self._live[place].items() if size}

    def _kind_of(self, tensor: Tensor) -> str:
        if self._kind != "activations" or not tensor.is_floating_point():
            return self._kind
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary:
            return "logits"
        # DeepSpeed's buffers are flat; a model's tensors of that size are not
        return "communication" if tensor.ndim == 1 else self._kind

    def _change(self, storage: Storage, size: int) -> None:
        self._live[storage.place][storage.kind] += size
        self._total[storage.place] += size
        if size > 0:
            self._compare(storage.place)

    def _compare(self, place: Place) -> None:
        if self._total[place] > self.peaks[place].total:
            self.peaks[place] = Peak(self._total[place], self.live(place), self.phase)

    def _forget(self, key: int) -> None:
        gone = self._storages.pop(key)
        self._change(gone, -gone.size)
