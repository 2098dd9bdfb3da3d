"""A state as it is now, in host memory, so that it can be written while training goes on.

The step that saves waits for one copy of the state's bytes and for nothing else. The memory is kept for
the next save: pages that were touched before cost nothing again, and on CUDA it is page-locked, so
that the copies run at the bus's rate.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from arctic_like.engine.states import (
    identity,
    is_dense,
    like,
    plain_tensors,
    standalone,
    view_of,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNED = 64
"""Bytes; what lies in the arena is aligned to them as it was where it came from."""
PAGE, SLICE = 2**12, 2**25
"""Bytes of a page of memory, and of what is touched between two chances for other threads."""
NICENESS = 10
"""Of threads beside training: where cores are scarce, training goes first."""


class HostArena:
    """Memory of this rank that snapshots are taken into, one at a time, grown to the largest so far."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._growing: threading.Thread | None = None

    def prepare(self, states: list[Any]) -> None:
        """Make room for states as large as these, beside what goes on: the first copy into new memory
        takes many times as long as the next, because the system has to find and clear every page."""
        import torch

        needed = _size(*_parts(states))
        if self._memory is not None and self._memory.numel() >= needed:
            return
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._growing = threading.Thread(
            target=self._grow, args=(needed, device), name="checkpoint memory", daemon=True
        )
        self._growing.start()

    def snapshot(self, states: list[Any]) -> list[Any]:
        """Copies of nested states that share nothing with them. Valid until the next call.

        Tensors lie in the arena, contiguous, on the CPU. Memory that several of them show is copied once
        (weights, and the flat tensor that they are parts of): each tensor is a storage of its own over its
        part, which is what a file gets of it. Those that were one tensor (same memory, shape and dtype)
        are one storage. Everything else is copied as `copy.deepcopy` does.
        """
        stretches, scattered = _parts(states)
        self._reserve(_size(stretches, scattered))
        places: dict[tuple[Any, ...], Tensor] = {}
        found = [t for one in stretches for t in one.tensors] + [t for ts in scattered for t in ts]
        devices = {tensor.device for tensor in found}
        used = 0
        for one in stretches:
            begin = used + one.start % ALIGNED
            self._part(begin, one.end - one.start).copy_(one.bytes(), non_blocking=True)
            for tensor in one.tensors:
                places.setdefault(
                    identity(tensor), self._place(tensor, begin + tensor.data_ptr() - one.start)
                )
            used += _room(one.end - one.start)
        for tensor, *_ in scattered:
            place = places[identity(tensor)] = self._place(tensor, used)
            place.copy_(tensor.detach(), non_blocking=True)
            used += _room(tensor.numel() * tensor.element_size())
        _wait(devices)
        memo: dict[int, Any] = {id(t): like(places[identity(t)], t) for t in found}
        return [copy.deepcopy(state, memo) for state in states]

    def _reserve(self, needed: int) -> None:
        if self._growing is not None:
            self._growing.join()
            self._growing = None
        if self._memory is None or self._memory.numel() < needed:
            self._memory = None  # the old one goes before there is a new one
            self._memory = _new_memory(needed)
            _lock_pages(self._memory)

    def _grow(self, needed: int, device: int | None) -> None:
        import torch

        step_back()
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins on the first one
        with contextlib.suppress(RuntimeError, MemoryError):  # the save will say so
            memory = _new_memory(needed)
            pages = memory.numpy()
            for begin in range(0, len(pages), SLICE):
                pages[begin : begin + SLICE : PAGE] = 0
            _lock_pages(memory)
            self._memory = memory

    def _part(self, begin: int, size: int) -> Tensor:
        assert self._memory is not None
        return self._memory[begin : begin + size]

    def _place(self, tensor: Tensor, begin: int) -> Tensor:
        """Room for a tensor in the arena."""
        return view_of(self._part(begin, tensor.numel() * tensor.element_size()), tensor)


def step_back() -> None:
    """Give this thread a lower priority than training has."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class _Stretch(NamedTuple):
    """Memory from `start` to `end` (addresses) of one storage, and the tensors that lie in it."""

    start: int
    end: int
    tensors: list[Tensor]

    def bytes(self) -> Tensor:
        """The memory as one tensor of bytes."""
        import torch

        storage = self.tensors[0].untyped_storage()
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return whole.set_(storage, self.start - storage.data_ptr(), (self.end - self.start,))  # type: ignore[call-overload,no-any-return]


def _parts(states: list[Any]) -> tuple[list[_Stretch], list[list[Tensor]]]:
    """What has to be copied of the states' tensors: stretches of memory, and tensors that lie in no order,
    those that are one together."""
    found = list({id(t): t for state in states for t in plain_tensors(state)}.values())
    scattered: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor in found:
        if not is_dense(tensor):
            scattered.setdefault(identity(tensor), []).append(tensor)
    return list(_stretches([t for t in found if is_dense(t)])), list(scattered.values())


def _size(stretches: list[_Stretch], scattered: list[list[Tensor]]) -> int:
    """Bytes of the arena for them."""
    return sum(_room(one.end - one.start) for one in stretches) + sum(
        _room(tensor.numel() * tensor.element_size()) for tensor, *_ in scattered
    )


def _new_memory(needed: int) -> Tensor:
    """Memory for a little more than is needed, so that a few more numbers do not ask for a new one."""
    import torch

    return torch.empty(needed + needed // 64 + PAGE, dtype=torch.uint8)


def _stretches(tensors: list[Tensor]) -> Iterator[_Stretch]:
    """Where dense tensors lie, each byte once: those of one storage that overlap or touch are together."""
    by_storage: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        by_storage.setdefault((storage.device, storage.data_ptr()), []).append(tensor)
    for same in by_storage.values():
        open_one: _Stretch | None = None
        for tensor in sorted(same, key=lambda tensor: tensor.data_ptr()):
            start = tensor.data_ptr()
            end = start + tensor.numel() * tensor.element_size()
            if open_one is not None and start <= open_one.end:
                together = [*open_one.tensors, tensor]
                open_one = _Stretch(open_one.start, max(open_one.end, end), together)
                continue
            if open_one is not None:
                yield open_one
            open_one = _Stretch(start, end, [tensor])
        if open_one is not None:
            yield open_one


def _room(size: int) -> int:
    """Bytes of the arena for so many, wherever between two multiples of `ALIGNED` they begin."""
    return -(-size // ALIGNED) * ALIGNED + ALIGNED


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


class Apart:
    """Stands in for DeepSpeed's checkpoint engine during a save: what it writes are states by themselves
    (`standalone`), so that DeepSpeed need not clone the weights first."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file."""
        self._writer.save(standalone(state_dict), path)

    def preserves_storage_sharing(self) -> bool:
        """Whether DeepSpeed has to clone weights that are parts of larger storages."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
