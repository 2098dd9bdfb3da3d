"""Whole weights of a model at every ZeRO stage: looked at, changed, and replaced for a while.

Two kinds of weights: the module's, in the model's dtype, which the forward uses; and the optimizer's,
fp32, which every step starts from (*master weights*). At stage 0 in fp32 they are one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arctic_like.engine.divided import division_of, joined, part_of, whole_shape
from arctic_like.engine.layout import assemble, shape_of
from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.engine.deepspeed import Engine


@contextlib.contextmanager
def full_parameters(
    engine: Engine, names: Sequence[str] | None, *, modify: bool
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the named parameters (all of them for None) are whole on every rank. Collective.

    modify: what rank 0 changes in them in place holds for all ranks and for the master weights, which
    keep their precision where nothing changed. Without it nothing may be changed. Raises RunError for
    weights that are divided among ranks that share layers.
    """
    found = named(engine, names)
    _expect_undivided(found)
    with _gathered(engine, list(found.values()), modify=modify):
        yield found
        if modify and engine.zero_stage < 3:
            _broadcast(found.values())
    if modify and engine.base_optimizer is not None:
        for parameter in found.values():
            _renew_master(engine, parameter)


def named_full_parameters(
    engine: Engine, names: Sequence[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole weight on the device in the model's dtype), one at a time, on every rank.

    The tensor is good until the next one is asked for, and is not to be changed. All ranks must iterate
    to the end, in step.
    """
    for name, parameter in named(engine, names).items():
        with _gathered(engine, [parameter], modify=False):
            yield name, joined(parameter, parameter.detach())


def master_weights(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(name, whole fp32 master weight on the device, a copy), one at a time, on every rank. Collective."""
    for name, parameter in engine.trained(frozen_too=True).items():
        yield name, whole(engine, parameter, engine.layout.flats)


def whole(engine: Engine, parameter: nn.Parameter, values: Sequence[Tensor]) -> Tensor:
    """The parameter's values, whole and float32, from tensors that lie like `partitions`. Collective."""
    layout = engine.layout
    where = layout.fragments.get(parameter)
    own = assemble(
        layout.piece(parameter, values), start=where.start if where else 0,
        shape=shape_of(parameter), group=engine.engine.seq_data_parallel_group,
        sharded=layout.sharded,
    )  # fmt: skip
    return joined(parameter, own)


def fill(engine: Engine, parameter: nn.Parameter, values: Sequence[Tensor], full: Tensor) -> None:
    """Write a whole tensor into this rank's part of tensors that lie like `partitions`."""
    where = engine.layout.fragments.get(parameter)
    piece = engine.layout.piece(parameter, values)
    if where is not None and piece is not None:
        own = part_of(parameter, full)
        piece.copy_(own.reshape(-1).narrow(0, where.start, where.count))


@contextlib.contextmanager
def swap_weights(engine: Engine, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module computes with other weights; afterwards with exactly its own. Collective.

    values: name → whole tensor, the same on all ranks; parameters and buffers, those not named stay.
    For evaluation: the optimizer's weights are not touched, and a training step inside is an error.
    """
    places = {**dict(engine.module.named_buffers()), **named(engine, None)}
    for name, value in values.items():
        if name not in places:
            raise RunError(f"there is no weight {name!r} to replace\n    see Engine.shapes()")
        if tuple(value.shape) != whole_shape(places[name]):  # type: ignore[arg-type]
            raise RunError(
                f"{name} has the shape {whole_shape(places[name])}, "  # type: ignore[arg-type]
                f"what shall replace it {tuple(value.shape)}"
            )
    with _swapped(
        engine, {id(places[n]): (places[n], _share(places[n], v)) for n, v in values.items()}
    ):
        yield


@contextlib.contextmanager
def partition_values(engine: Engine, values: Sequence[Tensor]) -> Iterator[None]:
    """As `swap_weights`, with tensors that lie like `partitions()`. At stage 3 nothing is gathered."""
    layout, trained = engine.layout, engine.trained(frozen_too=True)
    sizes = [tuple(flat.shape) for flat in layout.flats]
    if [tuple(value.shape) for value in values] != sizes:
        raise RunError(
            "these tensors do not lie like Engine.partitions(); after a change of shapes or of the "
            "number of ranks they must be made anew"
        )
    if engine.zero_stage < 3:
        places = {n: whole(engine, p, values) for n, p in trained.items()}
        with swap_weights(engine, places):
            yield
        return
    shares: dict[int, tuple[Any, Tensor]] = {}
    for parameter in trained.values():
        flat, offset, size = layout.optimizer.grad_position[
            layout.optimizer.get_param_id(parameter)
        ]
        shares[id(parameter)] = (parameter, values[flat].detach().narrow(0, offset, size))
    with _swapped(engine, shares):
        yield


def named(engine: Engine, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Parameters by name; of shared ones every name is known. Raises RunError for a stranger."""
    if names is None:
        return dict(engine.module.named_parameters())
    known = dict(engine.module.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in known:
            raise RunError(f"there is no parameter {name!r}\n    see Engine.shapes()")
    return {name: known[name] for name in names}


def _expect_undivided(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if division_of(parameter) is not None:
            raise RunError(
                f"{name} is divided among ranks that share layers "
                "(deepspeed.tensor_parallel.autotp_size), and cannot be changed in place\n"
                "    read it with named_full_parameters or master_weights, or name others"
            )


def release(engine: Any, zero_stage: int) -> None:
    """Take whole weights that ZeRO-3 keeps from one forward to the next back to the ranks' shares.

    engine: DeepSpeed's. Its own method of this name collects garbage as well, for 0.2 s.
    """
    if zero_stage == 3:
        engine.optimizer.empty_partition_cache()


@contextlib.contextmanager
def _swapped(engine: Engine, shares: Mapping[int, tuple[Any, Tensor]]) -> Iterator[None]:
    # Pointers are swapped, not values: the old weights come back to the bit, and cost no copy.
    release(engine.engine, engine.zero_stage)
    kept = []
    try:
        for place, value in shares.values():
            holder = getattr(place, "ds_tensor", place)
            kept.append((holder, holder.data))
            holder.data = value.to(holder.device, holder.dtype).view(holder.shape)
        engine.swapped += 1
        yield
    finally:
        engine.swapped -= 1
        release(engine.engine, engine.zero_stage)
        for holder, data in kept:
            holder.data = data


def _share(place: Any, value: Tensor) -> Tensor:
    """What this rank holds of a whole tensor: its padded share at stage 3, else all of it."""
    import torch

    own = part_of(place, value.detach())
    if not hasattr(place, "ds_tensor"):
        return own
    size = place.ds_tensor.numel()
    start = place.ds_zero_partition_rank * size
    flat = own.reshape(-1)[start : start + size]
    return torch.nn.functional.pad(flat, (0, size - flat.numel()))


def _gathered(
    engine: Engine, parameters: list[nn.Parameter], *, modify: bool
) -> contextlib.AbstractContextManager[Any]:
    if engine.zero_stage < 3:
        return contextlib.nullcontext()
    from deepspeed import zero

    gathered: contextlib.AbstractContextManager[Any] = zero.GatheredParameters(
        parameters, modifier_rank=0 if modify else None
    )
    return gathered


def _broadcast(parameters: Any) -> None:
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


def _renew_master(engine: Engine, parameter: nn.Parameter) -> None:
    """Where the module's weight is no longer its master's rounding, the master becomes the weight."""
    import torch

    master = engine.layout.piece(parameter, engine.layout.flats)
    weight = engine.layout.weight_piece(parameter)
    if master is None or weight is None or master.data_ptr() == weight.data_ptr():
        return
    weight = weight.to(master.device)
    same = master.to(weight.dtype) == weight
    master.copy_(torch.where(same, master, weight.to(master.dtype)))
