"""Some of an optimizer's parameter groups, as an optimizer that a torch scheduler accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

Group = dict[str, Any]


def view_of(optimizer: Optimizer, chosen: Callable[[Group], bool]) -> Optimizer:
    """An optimizer whose `param_groups` are those of `optimizer` for which `chosen` is true.

    The very same maps, looked up each time, as loading a checkpoint replaces them. `defaults` are
    what the first of them has (schedules of transformers read the highest rate there). It has no
    state and `step()` does nothing: it carries learning rates to where the update reads them.
    """
    from torch.optim import Optimizer as Base

    class View(Base):
        def __init__(self) -> None:  # Base's own would make groups and state of its own
            first = next(group for group in optimizer.param_groups if chosen(group))
            self.defaults = {key: first.get(key, v) for key, v in optimizer.defaults.items()}
            self.state = optimizer.state
            # a torch scheduler warns where it moves before the optimizer did; the loop keeps that
            self._opt_called = True

        @property
        def param_groups(self) -> list[Group]:  # type: ignore[override]
            return [group for group in optimizer.param_groups if chosen(group)]

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Nothing: a scheduler only wants to see that there is one."""

        def __repr__(self) -> str:
            return f"View({len(self.param_groups)} groups of {type(optimizer).__name__})"

    return View()
