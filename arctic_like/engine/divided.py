"""Parameters that DeepSpeed's AutoTP divided among the ranks that share layers.

Each rank of such a group holds one of equal parts of a weight, along its output or its input dimension,
and trains it as a parameter of its own; what ZeRO divides are these parts. Everything here is the identity
for a parameter that is whole. Written for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from arctic_like.engine.layout import shape_of
from arctic_like.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

META = "ds_autotp_universal_checkpoint_meta"
"""Where AutoTP notes at a parameter how it was divided (DS_AUTOTP_UC_META of deepspeed)."""

DIVIDED = "divided"
"""The key of `facts`."""

_engines: WeakSet[Any] = WeakSet()
"""Engines whose layers are divided; while there are any, DeepSpeed's groups are theirs."""


@dataclass(frozen=True)
class Division:
    """How a parameter is divided: `shape` is the whole, of which each rank has an equal part of `dim`."""

    dim: int
    shape: tuple[int, ...]


def division_of(parameter: Any) -> Division | None:
    """How AutoTP divided a parameter; None where every rank of the group has all of it."""
    facts = getattr(parameter, META, None)
    if not facts or facts["replicated"] or facts["partition_dim"] is None:
        return None
    if len(set(facts["partition_sizes"])) != 1:
        raise RunError(
            f"AutoTP divided a weight of the shape {facts['logical_shape']} into the unequal parts "
            f"{facts['partition_sizes']}\n    take another deepspeed.tensor_parallel.autotp_size"
        )
    return Division(facts["partition_dim"], tuple(facts["logical_shape"]))


def facts(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint notes: name → dimension of every weight of which its files hold parts."""
    named = ((name, division_of(p)) for name, p in module.named_parameters())
    found = {name: division.dim for name, division in named if division}
    return {DIVIDED: found} if found else {}


def is_divided(module: nn.Module) -> bool:
    """Whether any of a module's weights is divided."""
    return any(division_of(parameter) for parameter in module.parameters())


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape before anything was divided, by AutoTP or by ZeRO-3."""
    division = division_of(parameter)
    return division.shape if division else shape_of(parameter)


def joined(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The whole tensor from every rank's part, which has the shape that this rank's parameter has.
    Collective over the group; `part` itself where the parameter is whole."""
    import torch
    import torch.distributed as dist

    division = division_of(parameter)
    if division is None:
        return part
    given, group = part.detach().contiguous(), _group()
    parts = [torch.empty_like(given) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, given, group=group)
    return torch.cat(parts, division.dim)


def part_of(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor, a view: what the parameter would hold of it."""
    import torch.distributed as dist

    division = division_of(parameter)
    if division is None:
        return whole
    length = division.shape[division.dim] // dist.get_world_size(_group())
    return whole.narrow(division.dim, dist.get_rank(_group()) * length, length)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of the whole gradient, from this rank's `.grad`s: the parts of all ranks, and what all of
    them have once. On the device. Collective over the group where anything is divided."""
    import torch
    import torch.distributed as dist

    gradients: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients[division_of(parameter) is not None].append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(gradients[False])]
    if gradients[True]:
        square = torch.nn.utils.get_total_norm(gradients[True]).square()
        dist.all_reduce(square, group=_group())
        norms.append(square.sqrt())
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def before_opening(config: dict[str, Any]) -> bool:
    """To be called before a DeepSpeed engine is made of `config`; says whether it divides layers.

    DeepSpeed keeps the groups of ranks in its modules for the life of the process: those of a run that
    is over would be taken for the next one's.
    """
    from deepspeed.module_inject import set_autotp_mode
    from deepspeed.utils import groups

    divides = "tensor_parallel" in config
    if not _engines:
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP",
                     "_DATA_PARALLEL_GROUP", "mpu"):  # fmt: skip
            setattr(groups, name, None)
        set_autotp_mode(training=divides)
    return divides


def opened(engine: Any) -> None:
    """An engine that divides layers is there."""
    _engines.add(engine)


def closed(engine: Any) -> None:
    """It is gone."""
    _engines.discard(engine)


def forget() -> None:
    """The process's groups are gone, and every engine with them."""
    _engines.clear()


def _group() -> Any:
    from deepspeed.utils import groups

    return groups.get_tensor_model_parallel_group()
