"""Where each of DeepSpeed's optimizers keeps fp32 weights and gradients, read as one picture.

A *flat* is a tensor that the base optimizer updates: a whole parameter at stage 0 in fp32, elsewhere a
1-D tensor of many parameters, or this rank's share of one. A `Fragment` says which elements of a
parameter lie where in a flat. Everything above (gradients, surgery, swapping) is written once, against this.

    stage  dtype           DeepSpeed's class               flats                 gradients
    0      fp32            the base optimizer itself       parameters            `.grad`
    0      bf16, fp16      FP16_UnfusedOptimizer           one a parameter       `.grad`
    0      …, FusedAdam    FP16_Optimizer                  one a group           `.grad`
    1      bf16            BF16_Optimizer                  a share of a group    whole, fp32
    1, 2   all others      DeepSpeedZeroOptimizer          a share of a group    a share
    3      all             DeepSpeedZeroOptimizer_Stage3   shares of parameters  a share

Written for DeepSpeed 0.19.8. Its own accessors (`safe_get_full_grad`, …) are not used: setting a gradient
with them misses BF16_Optimizer's buffer, the padding of the last rank at stage 3, and the norms that
an offloaded optimizer remembers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """`count` elements of a flattened parameter from `start` lie in flat number `flat` from `offset`."""

    flat: int
    offset: int
    start: int
    count: int


class Layout:
    """Weights and gradients of the parameters that an engine trains.

    flats: what the base optimizer updates on this rank, fp32. They are the live tensors.
    groups: flat number → number of its parameter group.
    fragments: parameter → its part of a flat; absent where this rank has none of it.
    """

    sharded = True
    """Whether a rank has a share of each flat, not the whole."""
    sharded_gradients = True
    in_place = False
    """Whether a parameter may change its shape without a new engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer: Any = engine.optimizer
        self.flats: list[Tensor] = []
        self.groups: list[int] = []
        self.fragments: dict[nn.Parameter, Fragment] = {}

    def piece(self, parameter: nn.Parameter, values: Sequence[Tensor]) -> Tensor | None:
        """The parameter's elements in tensors laid out like `flats`: a 1-D view, or None."""
        where = self.fragments.get(parameter)
        return None if where is None else _cut_out(values[where.flat], where)

    def weight_piece(self, parameter: nn.Parameter) -> Tensor | None:
        """What the module holds of the elements that `piece` would give: a 1-D view in its dtype."""
        where = self.fragments.get(parameter)
        if where is None:
            return None
        return parameter.detach().reshape(-1).narrow(0, where.start, where.count)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's elements of the gradient, 1-D, scaled by the loss scale; None: has none, or zero."""
        return None if parameter.grad is None else _dense(parameter.grad).reshape(-1)

    def set_gradient(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Let the optimizer use another gradient: `whole`, 1-D, scaled by the loss scale."""
        parameter.grad = whole.reshape(parameter.shape).to(parameter.dtype, copy=True)

    def open_gradients(self) -> None:
        """Make the place for gradients that no backward has made (zeros)."""

    def range_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(start, count) of this rank's elements of a gradient."""
        where = self.fragments.get(parameter)
        if not self.sharded_gradients:
            return 0, numel_of(parameter)
        return (where.start, where.count) if where else (0, 0)


class Whole(Layout):
    """Stage 0: a flat is a parameter, or its fp32 copy."""

    sharded = sharded_gradients = False
    in_place = True

    def __init__(self, engine: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        super().__init__(engine)
        copies = getattr(self.optimizer, "fp32_groups", groups)
        trained = getattr(self.optimizer, "fp16_groups", groups)
        for number, (parameters, flats) in enumerate(zip(trained, copies, strict=True)):
            for parameter, flat in zip(parameters, flats, strict=True):
                self.fragments[parameter] = Fragment(len(self.flats), 0, 0, parameter.numel())
                self.flats.append(flat)
                self.groups.append(number)


class Fused(Layout):
    """Stage 0 in low precision with DeepSpeed's FusedAdam: whole flats of whole groups."""

    sharded = sharded_gradients = False

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        for number, parameters in enumerate(self.optimizer.fp16_groups):
            for parameter, offset in _in_order(parameters):
                self.fragments[parameter] = Fragment(number, offset, 0, parameter.numel())
        self.flats = list(self.optimizer.fp32_groups_flat)
        self.groups = list(range(len(self.flats)))


class Shared(Layout):
    """Stages 1 and 2: groups are laid one behind another, and cut into equal shares."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        optimizer = self.optimizer
        self.flats = list(optimizer.single_partition_of_fp32_groups)
        self.groups = list(range(len(self.flats)))
        for number, (parameters, offsets) in enumerate(
            zip(
                optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
            )
        ):
            group = optimizer.real_dp_process_group[number]
            self._cut(number, zip(parameters, offsets, strict=True), group)

    def _cut(self, number: int, placed: Any, group: Any) -> None:
        import torch.distributed as dist

        size = self.flats[number].numel()
        first = dist.get_rank(group) * size
        for parameter, offset in placed:
            start = max(offset, first)
            end = min(offset + parameter.numel(), first + size)
            if start < end:
                self.fragments[parameter] = Fragment(
                    number, start - first, start - offset, end - start
                )

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        place = self._place(parameter)
        return None if place is None else place.detach().reshape(-1)

    def set_gradient(self, parameter: nn.Parameter, whole: Tensor) -> None:
        place, where = self._place(parameter), self.fragments.get(parameter)
        if place is None or where is None:
            return
        piece = whole.narrow(0, where.start, where.count)
        place.detach().copy_(piece.reshape(place.shape))
        if self.optimizer.cpu_offload:  # there the norm is taken as gradients come
            number = self.optimizer.get_param_id(parameter)
            self.optimizer.norm_for_param_grads[number] = piece.double().norm(2)
            self.optimizer.update_offload_overflow_tracker(piece)

    def _place(self, parameter: nn.Parameter) -> Tensor | None:
        where = self.fragments.get(parameter)
        if where is None:
            return None
        gradients = self.optimizer.averaged_gradients.get(where.flat)
        flat = getattr(gradients, "flat_partition", None)
        if self.optimizer.cpu_offload:
            flat = self.flats[where.flat].grad
        if flat is not None:
            return _cut_out(flat, where)
        kept = (g for g in gradients if not getattr(g, "_zero_padding", False))
        own = self.optimizer.params_in_partition[where.flat]
        found = (g for g, p in zip(kept, own, strict=False) if p is parameter)
        place: Tensor = next(found)
        return place

    def open_gradients(self) -> None:
        import torch

        optimizer = self.optimizer
        if not optimizer.cpu_offload:
            for number, own in enumerate(optimizer.params_in_partition):
                dtype = optimizer.gradient_accumulation_dtype
                optimizer.all_grad_tensors[number] = [torch.zeros_like(p, dtype=dtype) for p in own]
        optimizer.finalize_gradient_accumulation_boundary()


class SharedBF16(Shared):
    """Stage 1 in bf16: as `Shared`, but every rank sums whole gradients in fp32."""

    sharded_gradients = False

    def __init__(self, engine: Any) -> None:
        Layout.__init__(self, engine)
        optimizer = self.optimizer
        self.flats = list(optimizer.fp32_groups_flat_partition)
        self.groups = list(range(len(self.flats)))
        self._gradients: dict[nn.Parameter, tuple[int, int]] = {}
        for number, parameters in enumerate(optimizer.bf16_groups):
            self._cut(number, _in_order(parameters), optimizer.real_dp_process_group[number])
            self._gradients |= {p: (number, index) for index, p in enumerate(parameters)}

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        number, index = self._gradients[parameter]
        gradient: Tensor = self.optimizer.fp32_groups_gradients[number][index]
        return gradient

    def set_gradient(self, parameter: nn.Parameter, whole: Tensor) -> None:
        number, index = self._gradients[parameter]
        self.optimizer.fp32_groups_gradients[number][index].copy_(whole)
        self.optimizer.fp32_groups_has_gradients[number][index] = True

    def open_gradients(self) -> None:
        """They are always there."""


class Partitioned(Layout):
    """Stage 3: each parameter is cut into equal shares, the last padded."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        optimizer = self.optimizer
        if optimizer.swap_optimizer:
            raise RunError(
                "the optimizer is offloaded to nvme, where its weights and gradients cannot be "
                "reached one by one\n    set zero_optimization.offload_optimizer.device to cpu"
            )
        self.flats = list(optimizer.fp32_partitioned_groups_flat)
        self.groups = [optimizer.sub_group_to_group_id[i] for i in range(len(self.flats))]
        for parameters in optimizer.fp16_groups:
            for parameter in parameters:
                flat, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = parameter.ds_zero_partition_rank * size
                count = min(size, parameter.ds_numel - start)
                if count > 0:
                    self.fragments[parameter] = Fragment(flat, offset, start, count)

    def weight_piece(self, parameter: nn.Parameter) -> Tensor | None:
        where = self.fragments.get(parameter)
        shard: Any = getattr(parameter, "ds_tensor", None)
        return None if where is None else shard.detach().reshape(-1).narrow(0, 0, where.count)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        where = self.fragments.get(parameter)
        if where is None:
            return None
        shard: Tensor = self.optimizer.get_local_fp32_grad_for_param(parameter)
        return shard.detach().narrow(0, 0, where.count)

    def set_gradient(self, parameter: nn.Parameter, whole: Tensor) -> None:
        import torch

        shard: Any = getattr(parameter, "ds_tensor", None)
        piece = torch.zeros(shard.numel(), dtype=torch.float32, device=whole.device)
        where = self.fragments.get(parameter)
        if where is not None:
            piece.narrow(0, 0, where.count).copy_(whole.narrow(0, where.start, where.count))
        self.optimizer.set_local_grad_for_param(piece, parameter)

    def open_gradients(self) -> None:
        self.optimizer.independent_gradient_partition_epilogue()


def layout_of(engine: Any, groups: Sequence[Sequence[nn.Parameter]]) -> Layout:
    """The layout of a DeepSpeed engine.

    groups: the base optimizer's trained parameters by group, as they were given to it.
    Raises RunError where DeepSpeed keeps them in a way that is not known here.
    """
    kind = type(engine.optimizer).__name__
    if kind == "FP16_UnfusedOptimizer" or engine.optimizer is engine.basic_optimizer:
        return Whole(engine, groups)
    kinds = {
        "FP16_Optimizer": Fused,
        "BF16_Optimizer": SharedBF16,
        "DeepSpeedZeroOptimizer": Shared,
        "DeepSpeedZeroOptimizer_Stage3": Partitioned,
    }
    if kind not in kinds or "Muon" in type(engine.basic_optimizer).__name__:
        name = kind if kind not in kinds else type(engine.basic_optimizer).__name__
        raise RunError(
            f"single gradients and weights cannot be reached under DeepSpeed's {name}\n"
            "    use another optimizer, and neither zenflow nor super_offload"
        )
    return kinds[kind](engine)


def loss_scale(engine: Any) -> float:
    """What DeepSpeed has multiplied gradients with: 1 unless it trains in fp16."""
    optimizer = engine.optimizer
    scaler = engine.torch_autocast_z0_gradscaler or getattr(
        optimizer, "torch_autocast_gradscaler", None
    )
    if scaler is not None:
        return float(scaler.get_scale())
    if getattr(optimizer, "custom_loss_scaler", False):
        return float(optimizer.external_loss_scale)
    return float(getattr(optimizer, "loss_scale", None) or 1.0)  # None: FP16_Optimizer in bf16


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape; ZeRO-3 leaves an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: nn.Parameter) -> int:
    """The whole parameter's number of elements."""
    return math.prod(shape_of(parameter))


def training_device() -> str:
    """The device that this process trains on, "cpu" or "cuda:0"."""
    from deepspeed.accelerator import get_accelerator

    return str(get_accelerator().current_device_name())


def assemble(
    piece: Tensor | None, *, start: int, shape: Sequence[int], group: Any, sharded: bool
) -> Tensor:
    """The whole float32 tensor, on the device, from every rank's 1-D piece; always a copy. Collective
    where `sharded`.

    The pieces do not overlap, so that a sum of their bits as whole numbers is exact to the sign of zero.
    """
    import torch
    import torch.distributed as dist

    if not sharded and piece is not None:
        target = torch.device(training_device())
        return piece.detach().to(target, torch.float32, copy=True).view(*shape)
    whole = torch.zeros(math.prod(shape), dtype=torch.float32, device=training_device())
    if piece is not None:
        whole.narrow(0, start, piece.numel()).copy_(piece)
    if sharded and dist.get_world_size(group) > 1:
        dist.all_reduce(whole.view(torch.int32), group=group)
    return whole.view(*shape)


def _cut_out(flat: Tensor, where: Fragment) -> Tensor:
    return flat.detach().reshape(-1).narrow(0, where.offset, where.count)


def _in_order(parameters: Sequence[nn.Parameter]) -> Iterator[tuple[nn.Parameter, int]]:
    offset = 0
    for parameter in parameters:
        yield parameter, offset
        offset += parameter.numel()


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
