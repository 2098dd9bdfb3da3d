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
    return {"base": _digest(engine), "trained": list(engine.trained(frozen_too=True))}


def check(engine: Engine, said: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where the weights that it does not hold are not this module's."""
    here = facts(engine)
    if here.get("base") != said.get("base"):
        raise CheckpointError(
            f"{folder} belongs to another base: the frozen weights, which it does not hold, are not "
            "those that it was trained over\n    bring back the model that model.name_or_path named"
        )
    if here and sorted(here["trained"]) != sorted(said["trained"]):
        names = sorted(set(here["trained"]) ^ set(said["trained"]))
        raise CheckpointError(
            f"{folder} was trained with another adapter: they differ in {', '.join(names[:3])}\n"
            "    resume with the adapter that was trained"
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


def _digest(engine: Engine) -> str:
    return str(vars(engine.module)[BASE]["fingerprint"]["digest"])
