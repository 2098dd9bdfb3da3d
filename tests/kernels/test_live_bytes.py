"""Counts the bytes of all tensors that are alive, and the most there were at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that an operation returns is counted until it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.largest = 0
        """The largest tensor that an operation returned, in bytes."""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):  # what was there before is not counted
            if isinstance(given, torch.Tensor) and self._id(given) not in self._known:
                self._remember(given, 0)
        found = function(*args, **(kwargs or {}))
        for made in tree_leaves(found):
            if isinstance(made, torch.Tensor) and self._id(made) not in self._known:
                self._remember(made, made.untyped_storage().nbytes())
        return found

    def _id(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _remember(self, tensor: torch.Tensor, size: int) -> None:
        key = self._id(tensor)
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        weakref.finalize(tensor.untyped_storage(), self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def test_counts_what_is_alive() -> None:
    with LiveBytes() as count:
        first = torch.zeros(1000)
        view = first[:10]
        second = first + 1
        del first
        assert count.live == 8000  # the view holds on to it
        del view
        third = second * 2
        del second, third
    assert (count.live, count.peak, count.largest) == (0, 8000, 4000)
