"""What DeepSpeed remembers of a model's order of layers at ZeRO 3, forgotten when the order changes.

DeepSpeed records in which order submodules run, and from then on frees a gathered weight after its module
only where it is not needed again soon (`stage3_max_reuse_distance`). What is freed where,
`PartitionedParameterCoordinator.__params_to_release`, it remembers by place and module for ever
(`functools.lru_cache`), also when that record is dropped for another (0.19.8). The first forward passes of a
run are checks without a backward; by their answers every weight would be freed after its forward and gathered
anew in the backward, in every step of the run. It also keeps every engine's model alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

NAME = "_PartitionedParameterCoordinator__params_to_release"


def forget_with_the_trace() -> None:
    """From now on what is remembered of a trace goes with it. Does nothing where nothing is remembered."""
    coordinator = _coordinator()
    clear = coordinator._clear_trace_structures
    if hasattr(clear, "__wrapped__") or _memo() is None:
        return

    @functools.wraps(clear)
    def cleared(self: Any) -> None:
        forget()
        clear(self)

    coordinator._clear_trace_structures = cleared


def forget() -> None:
    """Forget what is remembered, of all engines: it is found again at the next call of each."""
    memo = _memo()
    if memo is not None:
        memo()


def _memo() -> Callable[[], None] | None:
    """What empties the memory; DeepSpeed's decorator hides the function that has it."""
    function = getattr(_coordinator(), NAME, None)
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    for one in (function, *cells):
        if hasattr(one, "cache_clear"):
            return one.cache_clear  # type: ignore[no-any-return]
    return None


def _coordinator() -> Any:
    from deepspeed.runtime.zero import partitioned_param_coordinator

    return partitioned_param_coordinator.PartitionedParameterCoordinator
