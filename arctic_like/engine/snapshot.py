"""A state as it is now, in host memory, so that it can be written while training goes on.

The step that saves waits for one copy of the state's bytes and for nothing else. The memory is kept for
the next save: pages that were touched before cost nothing again, and on CUDA it is page-locked, so
that the copies run at the bus's rate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNED = 64
"""Bytes; a tensor in the arena begins at a multiple of it."""


class HostArena:
    """Memory of this rank that snapshots are taken into, one at a time, grown to the largest so far."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._used = 0

    def snapshot(self, states: list[Any]) -> list[Any]:
        """Copies of nested states that share nothing with them. Valid until the next call.

        Tensors lie in the arena, contiguous, on the CPU; those that were one tensor (same memory, shape
        and dtype) are one again. Everything else is copied as `copy.deepcopy` does.
        """
        found = list({id(t): t for state in states for t in _tensors(state)}.values())
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor in found:
            groups.setdefault(_identity(tensor), []).append(tensor)
        self._reserve(sum(_room(same[0]) for same in groups.values()))
        memo: dict[int, Any] = {}
        devices = set()
        for same in groups.values():
            first = same[0].detach()
            kept = self._take(first)
            kept.copy_(first, non_blocking=True)
            devices.add(first.device)
            for tensor in same:
                memo[id(tensor)] = _like(kept, tensor)
        _wait(devices)
        return [copy.deepcopy(state, memo) for state in states]

    def _reserve(self, needed: int) -> None:
        import torch

        self._used = 0
        if self._memory is None or self._memory.numel() < needed:
            self._memory = None  # the old one goes before there is a new one
            self._memory = torch.empty(needed, dtype=torch.uint8)
            _lock_pages(self._memory)

    def _take(self, tensor: Tensor) -> Tensor:
        import torch

        assert self._memory is not None
        size = tensor.numel() * tensor.element_size()
        # A storage of its own over its part of the arena: a file gets the whole storage of a tensor.
        place = torch.from_numpy(self._memory.numpy()[self._used : self._used + size])
        self._used += _room(tensor)
        return place.view(tensor.dtype).view(tensor.shape)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The plain tensors in maps, lists and tuples; others are left to `copy.deepcopy`."""
    import torch

    if isinstance(state, torch.Tensor):
        plain = type(state) in (torch.Tensor, torch.nn.Parameter) and not state.is_quantized
        if plain and state.layout == torch.strided and state.numel() and not state.is_meta:
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _tensors(value)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride(),
    )  # fmt: skip


def _room(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // ALIGNED) * ALIGNED


def _like(kept: Tensor, tensor: Tensor) -> Tensor:
    """The copy in the form of what it is a copy of: a parameter, a tensor that requires a gradient."""
    import torch

    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(kept, requires_grad=tensor.requires_grad)
    return kept.detach().requires_grad_(tensor.requires_grad)


def _wait(devices: set[torch.device]) -> None:
    import torch

    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _lock_pages(memory: Tensor) -> None:
    """Page-lock the arena where there is a GPU; where the system refuses, copies are slower and as right.

    Not `pin_memory()`: torch's allocator rounds up to a power of two, which of 70 GB makes 128.
    """
    import torch

    if torch.cuda.is_available() and memory.numel():
        cuda: Any = torch.cuda
        cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)


class CapturedFile(NamedTuple):
    """A file that DeepSpeed would have written. state: alive, to be copied before the next step."""

    state: Any
    path: str
    write: Callable[[Any, str], None]
    """Writes a copy of the state there, as DeepSpeed would have; for any thread."""


class Capture:
    """Stands in for DeepSpeed's checkpoint engine during a save: notes what goes into which file."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.files: list[CapturedFile] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Note a file instead of writing it."""
        self.files.append(CapturedFile(state_dict, path, self._writer.save))

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed has to clone weights that are parts of larger storages: the snapshot does."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
