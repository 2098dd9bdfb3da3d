"""A model's weights one after another, gathered piece by piece where ZeRO-3 partitions them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def iterate_weights(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """(name, full CPU tensor) of every parameter and persistent buffer, in the module's order.

    The tensor is there on rank 0 and None elsewhere; all ranks must iterate to the end, in step. At
    most one parameter is whole at a time. Shared weights come once, under the name that a
    transformers model calls their source, else under their first. The tensors are copies, of the
    weights' own dtype.
    """
    main = _is_main()
    for name, parameter in named_weights(module).items():
        yield name, _whole(parameter, keep=main)
    for name, buffer in _persistent_buffers(module):
        yield name, (buffer.detach().cpu().clone() if main else None)


def named_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name under which a checkpoint holds it."""
    sources = set(getattr(module, "all_tied_weights_keys", {}).values())
    names: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter not in names or name in sources:
            names[parameter] = name
    return {name: parameter for parameter, name in names.items()}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights, each once, whole."""
    from arctic_like.engine.divided import whole_shape

    return sum(math.prod(whole_shape(p)) * p.element_size() for p in named_weights(module).values())


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers():
        path, _, leaf = name.rpartition(".")
        if leaf not in module.get_submodule(path)._non_persistent_buffers_set:
            yield name, buffer


def _whole(parameter: Any, *, keep: bool) -> Tensor | None:
    from arctic_like.engine.divided import joined

    if not hasattr(parameter, "ds_id"):
        whole = joined(parameter, parameter.detach())
        return whole.cpu().clone() if keep else None
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        whole = joined(parameter, parameter.detach())
        return whole.cpu().clone() if keep else None


def _is_main() -> bool:
    import torch.distributed as dist

    return not dist.is_initialized() or dist.get_rank() == 0
