"""The values that parts may ask for by parameter name, in place of the trainer itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from arctic_like.world import World


@dataclass(frozen=True)
class RunInfo:
    """Read-only facts of a run. A part's `build(…)` receives those that its parameters name.

    What the DataFactory publishes (`facts()`: number of samples, tokens, …) can be named too.
    """

    output_dir: Path
    seed: int
    world: World
    device: str
    epochs: int | None = None
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    global_batch_size: int = 1
    steps_per_epoch: int | None = None
    training_horizon: int | None = None
    """Optimizer steps of the whole run; known once the data is."""
    warmup_steps: int | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """The recipe's `deepspeed:` section, as stated."""
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def total_steps(self) -> int | None:
        """Another name of `training_horizon`, the one that schedulers use."""
        return self.training_horizon

    def values(self) -> dict[str, Any]:
        """Everything that can be asked for, by name; the data's facts give way to ours."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "facts"}
        return {**self.facts, **own, "total_steps": self.total_steps, "facts": self.facts}


def supply(function: Callable[..., Any], info: RunInfo | None = None, **extra: Any) -> Any:
    """Call `function` with those of `extra` and of `info` that its parameters name.

    Raises TypeError naming the parameter where one without a default is not to be had.
    """
    have = {**(info.values() if info else {}), **extra}
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in have:
            arguments[name] = have[name]
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"{function.__qualname__} asks for {name!r}, which this run does not provide; "
                f"it provides {', '.join(sorted(have))}"
            )
    return function(**arguments)
