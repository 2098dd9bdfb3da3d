"""Counts, on a CPU, where a run would make its host wait for a device.

A tensor counts as the device's if it comes from the module's parameters or from what `to_device` gave;
what is computed from one of those is one, by its storage. Reading such a tensor's value is a wait, as is
every operation whose result has a shape that depends on values.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "is_nonzero", "allclose",
}  # fmt: skip
MASKED = {"index", "index_put", "index_put_", "_index_put_impl_"}
READING = ("tolist", "numpy", "cpu", "__array__")
"""Methods that copy to the host, and show no operation on a CPU."""


class Waits(TorchDispatchMode):
    """The mode; `found` counts (whose code, where, what)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()
        self._device: dict[int, StorageWeakRef] = {}
        self.operations = 0

    def mark(self, value: Any) -> None:
        """These tensors are the device's."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._device[storage._cdata] = StorageWeakRef(storage)

    def on_device(self, value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return False
        known = self._device.get(value.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        found = func(*args, **(kwargs or {}))
        if any(self.on_device(leaf) for leaf in leaves):
            self.operations += 1
            name = func._schema.name.removeprefix("aten::")
            masked = name in MASKED and any(
                isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in leaves[1:]
            )
            counted = name == "repeat_interleave" and func._overloadname == "Tensor"
            if name in WAITING or masked or counted:
                self.note(name)
            self.mark(found)
        return found

    def note(self, what: str) -> None:
        """Charge a wait to the innermost frame that is not torch's."""
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            for owner in ("deepspeed", "transformers", "arctic_like", "peft"):
                if owner in file.parts[:-1]:
                    where = f"{file.stem}.{frame.f_code.co_name}"
                    self.found[(owner, where, what)] += 1
                    return
            frame = frame.f_back  # type: ignore[assignment]
        self.found[("torch", "", what)] += 1

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count the methods of `READING` too."""
        with contextlib.ExitStack() as stack:
            for name in READING:
                method = getattr(torch.Tensor, name)

                def counted(
                    own: Any, *values: Any, method: Any = method, name: str = name, **named: Any
                ) -> Any:
                    if self.on_device(own):
                        self.note(name)
                    return method(own, *values, **named)

                setattr(torch.Tensor, name, counted)
                stack.callback(setattr, torch.Tensor, name, method)
            yield

    def of(self, owner: str) -> dict[str, int]:
        """Where someone's code waits, and how often."""
        return {
            f"{where} {what}": n for (who, where, what), n in self.found.items() if who == owner
        }


def watch(trainer: Any, waits: Waits, *, steps: range) -> None:
    """Count in the whole of these steps: data, weights, forward, backward, update, what follows."""
    to_device, one = trainer.to_device, trainer._next_step

    def marked(batch: Any) -> Any:
        moved = to_device(
            {k: v.clone() for k, v in batch.items()}
        )  # as a copy on a device would be
        waits.mark(moved)
        return moved

    def counted() -> None:
        if trainer.global_step + 1 not in steps:
            return one()
        for learner in trainer.learners.values():
            engine = learner.engine
            waits.mark(
                [list(engine.module.parameters()), [p.grad for p in engine.module.parameters()]]
            )
            if engine.base_optimizer is not None:
                waits.mark(engine.partitions())
        with waits, waits.reading():
            one()
        return None

    trainer.to_device, trainer._next_step = marked, counted
