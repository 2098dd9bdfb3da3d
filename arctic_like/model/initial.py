"""Initial weights that depend on the seed and on names only.

A model's own `_init_weights(module)` knows the distributions; what it draws depends, in
transformers, on the order of construction, which ZeRO-3, loading and ranks change. Here it is
called for one module after another, each under a generator seeded by (seed, module name), on full
fp32 CPU copies of the parameters, so that stage, ranks, device and load path do not matter, and
the dtype only by its rounding. The order is that of transformers'
`PreTrainedModel.initialize_weights`: children first, and each submodel's own rule for its modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.model.randomness import seed_by_name, untouched_randomness

if TYPE_CHECKING:
    from torch import nn
    from torch.nn import Parameter

_FLAG = "_is_hf_initialized"


def initialise(model: nn.Module, *, seed: int, names: Collection[str] | None = None) -> None:
    """Draw the weights of a transformers model anew, in place.

    names: the parameters to draw (what a checkpoint did not bring); None is all of them. Shared
    parameters are drawn once, by the module that `all_tied_weights_keys` calls the source. Where
    parameters are partitioned (ZeRO-3), all ranks must call it.
    """
    import torch
    from transformers.initialization import guard_torch_init_functions

    homes = _homes(model)
    wanted = {p for p, home in homes.items() if names is None or not home.names.isdisjoint(names)}
    for parameter in homes:
        setattr(parameter, _FLAG, parameter not in wanted)
    with untouched_randomness(), torch.no_grad(), guard_torch_init_functions():
        for name, owner, module in _calls(model):
            reach = list(_reach(module))
            if names is None or not wanted.isdisjoint(reach):
                mine = {p for p in _own(module) if p in wanted and homes[p].module == name}
                with whole_in_float32(reach):
                    seed_by_name(seed, name)
                    _initialise_one(owner, module, mine)
    for parameter in homes:
        setattr(parameter, _FLAG, True)


@dataclass(frozen=True)
class _Home:
    """Where a parameter belongs: the module that draws it, and all of its names."""

    module: str
    names: frozenset[str]


def _homes(model: nn.Module) -> dict[Parameter, _Home]:
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    sources = set(getattr(model, "all_tied_weights_keys", {}).values())
    homes = {}
    for parameter, all_names in names.items():
        home = next((name for name in all_names if name in sources), all_names[0])
        homes[parameter] = _Home(home.rpartition(".")[0], frozenset(all_names))
    return homes


def _calls(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """(name, nearest transformers model above, module), children before their parents."""
    from transformers import PreTrainedModel

    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str, owner: Any) -> Iterator[tuple[str, Any, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name, owner)
        yield name, owner, module

    return walk(model, "", model)


def _own(module: nn.Module) -> list[Parameter]:
    return list(module.parameters(recurse=False))


def _reach(module: nn.Module) -> Iterable[Parameter]:
    """The parameters that `_init_weights(module)` may write: its own and those close below.

    Whole submodels and lists of layers end it: no more than about a layer is gathered at once.
    """
    from torch.nn import ModuleDict, ModuleList
    from transformers import PreTrainedModel

    deep = not isinstance(module, PreTrainedModel | ModuleList | ModuleDict)
    yield from _own(module)
    for child in module.children():
        if not isinstance(child, PreTrainedModel | ModuleList | ModuleDict):
            yield from child.parameters(recurse=deep)


def _initialise_one(owner: Any, module: nn.Module, mine: set[Parameter]) -> None:
    """Draw the parameters of one module, `mine` among its own; others' are left as they are."""
    foreign = [p for p in _own(module) if p not in mine and not getattr(p, _FLAG)]
    for parameter in foreign:
        setattr(parameter, _FLAG, True)
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        # A mark for what the model's rule does not reach; torch's own default fills that in.
        for parameter in mine:
            parameter.fill_(float("nan"))
    owner._init_weights(module)
    if reset is not None and any(parameter.isnan().any() for parameter in mine):
        done = [parameter for parameter in mine if not parameter.isnan().any()]
        for parameter in done:
            setattr(parameter, _FLAG, True)
        reset()
        for parameter in done:
            setattr(parameter, _FLAG, False)
    for parameter in foreign:
        setattr(parameter, _FLAG, False)


@contextmanager
def whole_in_float32(parameters: list[Parameter]) -> Iterator[None]:
    """Within the body these parameters are full fp32 CPU tensors; what is written there, stays.

    Partitioned parameters (ZeRO-3) are gathered and split again; rank 0's values count.
    """
    import torch

    with gathered(parameters):
        kept = [(p, p.data) for p in dict.fromkeys(parameters) if p.is_floating_point()]
        for parameter, data in kept:
            parameter.data = data.to(device="cpu", dtype=torch.float32)
        try:
            yield
        finally:
            for parameter, data in kept:
                if parameter.data_ptr() != data.data_ptr():
                    data.copy_(parameter.data)
                    parameter.data = data


@contextmanager
def gathered(parameters: list[Parameter]) -> Iterator[None]:
    """Inside, partitioned parameters (ZeRO-3) are whole; what rank 0 writes there, stays. Collective."""
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
    else:
        yield
