"""Checkpoints of a module whose frozen weights its recipe brings back: only what is trained is in them.

Such a module has `adapter_base`, a map with the `fingerprint` of those weights. A checkpoint keeps its digest
and the names that were trained, and both must be the module's again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from arctic_like.engine.deepspeed import Engine

BASE = "adapter_base"


def is_rebuilt(module: nn.Module) -> bool:
    """Whether the recipe brings back what is frozen."""
    return BASE in vars(module)


def facts(engine: Engine) -> dict[str, Any]:
    """What a checkpoint says of the weights that it does not hold."""
    if not is_rebuilt(engine.module):
        return {}
    return {"base": _digest(engine.module), "trained": list(engine.trained(frozen_too=True))}


def check(engine: Engine, said: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where a checkpoint was not trained with this base and this adapter."""
    same_base(engine.module, said, folder)
    trained = facts(engine).get("trained", [])
    if differ := sorted(set(trained) ^ set(said.get("trained", []))):
        raise CheckpointError(
            f"{folder} was trained with another adapter: they differ in {', '.join(differ[:3])}\n"
            "    resume with the adapter that was trained"
        )


def same_base(module: nn.Module, said: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where the weights that a checkpoint does not hold are not this module's."""
    here = _digest(module) if is_rebuilt(module) else None
    if here != said.get("base"):
        raise CheckpointError(
            f"{folder} belongs to another base: the frozen weights, which it does not hold, are not "
            "those that it was trained over\n    bring back the model that model.name_or_path named"
        )


@contextlib.contextmanager
def trained_only(engine: Engine) -> Iterator[bool]:
    """Inside, DeepSpeed's engine writes the weights that the optimizer was made for, and no others, where
    the recipe brings those back; yields whether it does.

    DeepSpeed (0.19.8) can leave out frozen parameters itself, but not under the second name of tied ones,
    and it would leave out what a callback has frozen for a while.
    """
    if not is_rebuilt(engine.module):
        yield False
        return
    trained = set(engine.trained(frozen_too=True).values())
    parameters = engine.module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if parameter not in trained}

    def state(*args: Any, **kwargs: Any) -> dict[str, Any]:
        whole = engine.module.state_dict()
        return {name: value for name, value in whole.items() if not _of(name, frozen)}

    vars(engine.engine)["module_state_dict"] = state
    try:
        yield True
    finally:
        del vars(engine.engine)["module_state_dict"]


def _of(name: str, frozen: set[str]) -> bool:
    """Whether an entry is a frozen parameter's, or its quantisation's (`weight.absmax`)."""
    while name:
        if name in frozen:
            return True
        name = name.rpartition(".")[0]
    return False


def _digest(module: nn.Module) -> str:
    return str(vars(module)[BASE]["fingerprint"]["digest"])
