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
"""Bytes; what lies in the arena is aligned to them as it was where it came from."""


class HostArena:
    """Memory of this rank that snapshots are taken into, one at a time, grown to the largest so far."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def snapshot(self, states: list[Any]) -> list[Any]:
        """Copies of nested states that share nothing with them. Valid until the next call.

        Tensors lie in the arena, contiguous, on the CPU. Memory that several of them show is copied once
        (weights, and the flat tensor that they are parts of): each tensor is a storage of its own over its
        part, which is what a file gets of it. Those that were one tensor (same memory, shape and dtype)
        are one storage. Everything else is copied as `copy.deepcopy` does.
        """
        found = list({id(t): t for state in states for t in _tensors(state)}.values())
        dense = [t for t in found if _is_dense(t)]
        stretches = list(_stretches(dense))
        scattered = {_identity(t): t for t in found if not _is_dense(t)}
        self._reserve(
            sum(_room(one.end - one.start) for one in stretches)
            + sum(_room(t.numel() * t.element_size()) for t in scattered.values())
        )
        places: dict[tuple[Any, ...], Tensor] = {}
        devices = {tensor.device for tensor in found}
        used = 0
        for one in stretches:
            begin = used + one.start % ALIGNED
            self._part(begin, one.end - one.start).copy_(one.bytes(), non_blocking=True)
            for tensor in one.tensors:
                places.setdefault(
                    _identity(tensor), self._place(tensor, begin + tensor.data_ptr() - one.start)
                )
            used += _room(one.end - one.start)
        for identity, tensor in scattered.items():
            places[identity] = self._place(tensor, used)
            places[identity].copy_(tensor.detach(), non_blocking=True)
            used += _room(tensor.numel() * tensor.element_size())
        _wait(devices)
        memo: dict[int, Any] = {id(t): _like(places[_identity(t)], t) for t in found}
        return [copy.deepcopy(state, memo) for state in states]

    def _reserve(self, needed: int) -> None:
        import torch

        if self._memory is None or self._memory.numel() < needed:
            self._memory = None  # the old one goes before there is a new one
            self._memory = torch.empty(needed, dtype=torch.uint8)
            _lock_pages(self._memory)

    def _part(self, begin: int, size: int) -> Tensor:
        assert self._memory is not None
        return self._memory[begin : begin + size]

    def _place(self, tensor: Tensor, begin: int) -> Tensor:
        """Room for a tensor in the arena."""
        return _view(self._part(begin, tensor.numel() * tensor.element_size()), tensor)


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


def standalone(state: Any) -> Any:
    """A nested state whose tensors are not parts of larger storages, which files would get whole.

    On the CPU they share memory with those given; what lies on a device is copied to the host.
    """
    memo: dict[int, Any] = {}
    parts: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tensors_in(state):
        memo[id(tensor)] = tensor
        if not _is_plain(tensor) or not _is_dense(tensor):
            continue
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            part = parts.get(_identity(tensor))
            if part is None:
                part = parts[_identity(tensor)] = _own_storage(tensor.detach())
            memo[id(tensor)] = _like(part, tensor)
    return copy.deepcopy(state, memo)


def _own_storage(tensor: Tensor) -> Tensor:
    """The same numbers in a storage that holds nothing else: of a CPU tensor, over the same memory."""
    if tensor.device.type != "cpu":
        return tensor.cpu()
    import torch

    return _view(tensor.reshape(-1).view(torch.uint8), tensor)


def _view(memory: Tensor, tensor: Tensor) -> Tensor:
    """A tensor like `tensor` over bytes on the CPU, with a storage of its own."""
    import torch

    return torch.from_numpy(memory.numpy()).view(tensor.dtype).view(tensor.shape)


def tensors_in(state: Any) -> Iterator[Tensor]:
    """The tensors in maps, lists and tuples."""
    import torch

    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The plain ones of `tensors_in`; others are left to `copy.deepcopy`."""
    return (tensor for tensor in tensors_in(state) if _is_plain(tensor))


def _is_plain(tensor: Tensor) -> bool:
    import torch

    return bool(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_quantized
        and tensor.layout == torch.strided
        and tensor.numel()
        and not tensor.is_meta
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers are the bytes from its first on, in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride(),
        tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def _room(size: int) -> int:
    """Bytes of the arena for so many, wherever between two multiples of `ALIGNED` they begin."""
    return -(-size // ALIGNED) * ALIGNED + ALIGNED


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
