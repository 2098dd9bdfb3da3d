"""Tensors in nested states of maps, lists and tuples, and what memory they lie in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def standalone(state: Any) -> Any:
    """A nested state whose tensors are not parts of larger storages, which files would get whole.

    On the CPU they share memory with those given; what lies on a device is copied to the host.
    """
    memo: dict[int, Any] = {}
    parts: dict[tuple[Any, ...], Tensor] = {}
    for tensor in tensors_in(state):
        memo[id(tensor)] = tensor
        if not is_plain(tensor) or not is_dense(tensor):
            continue
        if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
            part = parts.get(identity(tensor))
            if part is None:
                part = parts[identity(tensor)] = _own_storage(tensor.detach())
            memo[id(tensor)] = like(part, tensor)
    return copy.deepcopy(state, memo)


def _own_storage(tensor: Tensor) -> Tensor:
    """The same numbers in a storage that holds nothing else: of a CPU tensor, over the same memory."""
    if tensor.device.type != "cpu":
        return tensor.cpu()
    import torch

    return view_of(tensor.reshape(-1).view(torch.uint8), tensor)


def view_of(memory: Tensor, tensor: Tensor) -> Tensor:
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


def plain_tensors(state: Any) -> Iterator[Tensor]:
    """The plain ones of `tensors_in`; others are left to `copy.deepcopy`."""
    return (tensor for tensor in tensors_in(state) if is_plain(tensor))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is torch's own kind of tensor, with numbers in memory."""
    import torch

    return bool(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not tensor.is_quantized
        and tensor.layout == torch.strided
        and tensor.numel()
        and not tensor.is_meta
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers are the bytes from its first on, in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are one: the same memory, seen in the same way."""
    return (
        tensor.data_ptr(), tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride(),
        tensor.is_conj(), tensor.is_neg(),
    )  # fmt: skip


def like(kept: Tensor, tensor: Tensor) -> Tensor:
    """The copy in the form of what it is a copy of: a parameter, a tensor that requires a gradient."""
    import torch

    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(kept, requires_grad=tensor.requires_grad)
    return kept.detach().requires_grad_(tensor.requires_grad)
