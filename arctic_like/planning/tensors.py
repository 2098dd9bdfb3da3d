"""The mode under which a rehearsal runs: operations on tensors without memory, each noted."""

from __future__ import annotations

from typing import Any

import arctic_like.planning.known as known
from arctic_like.planning.exchanges import Exchanges
from arctic_like.planning.memory import Memory


def rehearsing(memory: Memory, exchanges: Exchanges | None = None) -> Any:
    """A context in which tensors have no memory, those that are made are counted, what collectives send is
    too, and values of whole numbers are known (`known.py`)."""
    from contextlib import ExitStack

    from torch._subclasses.fake_tensor import FakeTensorMode

    stack = ExitStack()
    stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
    stack.enter_context(_mode(memory, exchanges or Exchanges()))
    return stack


def _mode(memory: Memory, exchanges: Exchanges) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
    from torch.utils._pytree import tree_leaves

    aten = torch.ops.aten

    class Rehearsing(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            exchanges.see(function, args)
            special = _SPECIAL.get(function)
            if special is not None:
                return special(args, kwargs)
            if function is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
                # torch's form of it without memory knows bf16 alone
                groups = args[2] if len(args) > 2 else kwargs.get("offs")
                found = _grouped(args[0], args[1], groups)
                self._remember(found, None)
                return found
            value = known.computed(function, args, kwargs)
            if function in _SIZED_BY_VALUES:
                if function is aten.index.Tensor:
                    args = (args[0], _places(args[1]))
                    found = function(*args)
                else:
                    found = _of_unknown_size(function, args, value)
            else:
                found = function(*args, **kwargs)
            self._remember(found, value)
            return found

        def _remember(self, found: Any, value: Any) -> None:
            made = [found] if isinstance(found, torch.Tensor) else tree_leaves(found)
            values: list[Any] = [None] * len(made)
            if value is not None:
                values = tree_leaves(value)
            for tensor, own in zip(made, values, strict=False):
                if not isinstance(tensor, FakeTensor):
                    continue
                memory.add(tensor)
                kept = own is not None and known.is_known(own)
                known.remember(tensor, own if kept else None)

    def _grouped(left: Any, right: Any, groups: Any = None) -> Any:
        """(m, k) · (g, k, n) → (m, n); (m, k) · (k, n) by groups of k → (g, m, n)."""
        if left.ndim == right.ndim == 2:
            return left.new_empty((len(groups), left.shape[0], right.shape[1]))
        return left.new_empty((left.shape[-2], right.shape[-1]))

    def scalar(args: Any, _: Any) -> Any:
        (tensor,) = args
        value = known.value_of(tensor)
        if value is not None:
            with _disable_current_modes():
                return value.item()
        return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0

    def _places(indices: Any) -> list[Any]:
        """Masks as the places that they name; where their values are not known, as many as there can be."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            value, count = known.value_of(index), index.numel()
            if value is not None:
                with _disable_current_modes():
                    count = int(value.count_nonzero())
            places = [
                torch.empty(count, dtype=torch.int64, device=index.device) for _ in index.shape
            ]
            for one in places:
                memory.add(one)
            found += places
        return found

    def _of_unknown_size(function: Any, args: Any, value: Any) -> Any:
        if value is None:  # as many as there can be
            tensor = args[0]
            if function is aten.nonzero.default:
                return torch.empty(
                    (tensor.numel(), tensor.ndim), dtype=torch.int64, device=tensor.device
                )
            return tensor.new_empty(tensor.numel())
        made = [
            torch.empty(one.shape, dtype=one.dtype, device=args[0].device)
            for one in tree_leaves(value)
        ]
        return made[0] if isinstance(value, torch.Tensor) else type(value)(made)

    _SPECIAL = {
        aten._local_scalar_dense.default: scalar,
        aten.equal.default: lambda args, _: True,
        aten.is_nonzero.default: scalar,
    }
    _SIZED_BY_VALUES = {
        aten.nonzero.default, aten.index.Tensor, aten._unique2.default, aten.unique_consecutive.default,
        aten.masked_select.default, aten.repeat_interleave.Tensor,
    }  # fmt: skip
    return Rehearsing()  # type: ignore[no-untyped-call]
