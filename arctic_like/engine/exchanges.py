"""Where DeepSpeed's exchanges among ranks are bracketed, so that their time can be told from computation.

All of its collectives go through one backend object of `deepspeed.comm`. Of one that runs beside the
computation the beginning is bracketed, and the wait for its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "broadcast", "all_gather", "all_gather_into_tensor",
    "all_gather_coalesced", "all_to_all", "all_to_all_single", "gather", "scatter", "barrier",
)  # fmt: skip


class _Handle:
    """A collective under way, whose `wait` is bracketed; else what it stands for."""

    def __init__(self, work: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._work, self._around = work, around

    def wait(self, *arguments: Any, **named: Any) -> Any:
        with self._around():
            return self._work.wait(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def bracket_exchanges(around: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
    """Enter `around()` around each collective of DeepSpeed in this process; returns what ends that.

    Replaces an earlier bracket. Needs open process groups (`engine.host.connect`).
    """
    from deepspeed.comm import comm

    backend: Any = comm.cdb

    def bracketed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            with around():
                found = method(*arguments, **named)
            return _Handle(found, around) if hasattr(found, "wait") else found

        return call

    def end() -> None:
        for name in COLLECTIVES:
            vars(backend).pop(name, None)

    end()
    for name in COLLECTIVES:
        if hasattr(backend, name):
            setattr(backend, name, bracketed(getattr(backend, name)))
    return end
