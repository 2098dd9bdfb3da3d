"""Memory that DeepSpeed (0.19.8) takes and does without: copies that hold the same numbers, and wide
temporaries.

- At stages 1 and 2 in fp32 it keeps the weights twice: the module's, and a clone that the optimizer updates
  and copies back. Here the optimizer updates this rank's share of the module's own.
- There it also gathers gradients in one buffer, and copies them into another for the optimizer; with
  accumulation one more buffer a micro-batch. Here they are summed where the optimizer reads them, as
  DeepSpeed does itself where it sums bf16 gradients in fp32.
- Norms are taken of a float64 copy of each gradient, which of an embedding is twice its size. Here the
  copies are of pieces; the sum of squares is in float64 as before.
- Asking whether an optimizer is supported imports Muon, which compiles at import: 1.4 s and 41 MB for
  every run. Here it compiles when it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NORM_PIECE = {"cpu": 2**18}
"""Elements that are widened at a time: on a CPU what stays in its cache."""
NORM_PIECE_ELSEWHERE = 2**24
"""A GPU starts a few kernels a piece."""


def compile_muon_when_used() -> None:
    """Import DeepSpeed's Muon without compiling it."""
    import sys

    name = "deepspeed.runtime.zero.muon.original_muon"
    if name in sys.modules:
        return
    import importlib

    from deepspeed.runtime import compiler

    own = compiler.compile
    compiler.compile = lambda: _when_called(own())
    try:
        importlib.import_module(name)
    except ImportError:  # a version without Muon
        pass
    finally:
        compiler.compile = own


def _when_called(decorate: Callable[..., Any]) -> Callable[..., Any]:
    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: decorate(function))

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return compiled()(*arguments, **named)

        return call

    return decorator


def save_memory(optimizer: Any) -> None:
    """Change one of DeepSpeed's sharded optimizers, fresh from `deepspeed.initialize`; others stay as
    they are."""
    kind = type(optimizer).__name__
    if kind not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        return
    _take_norms_in_pieces(optimizer)
    if kind == "DeepSpeedZeroOptimizer" and not optimizer.cpu_offload:
        _update_in_place(optimizer)
        _sum_gradients_in_place(optimizer)


def _take_norms_in_pieces(optimizer: Any) -> None:
    whole = optimizer.get_grad_norm_direct

    def norm(gradients: Sequence[Tensor], params: Sequence[Any], norm_type: int = 2) -> Any:
        pieces = list(_pieces(gradients, params))
        if not pieces:
            return whole(gradients, params, norm_type)
        return whole([piece for piece, _ in pieces], [p for _, p in pieces], norm_type)

    optimizer.get_grad_norm_direct = norm


def _pieces(gradients: Sequence[Tensor], params: Sequence[Any]) -> Iterator[tuple[Tensor, Any]]:
    """Each gradient in 1-D pieces, with its parameter; without what only fills up a share."""
    import torch

    real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    for gradient, parameter in zip(real, params, strict=False):
        size = NORM_PIECE.get(gradient.device.type, NORM_PIECE_ELSEWHERE)
        for piece in torch.split(gradient.detach().reshape(-1), size):
            yield piece, parameter


def _update_in_place(optimizer: Any) -> None:
    """Let what the optimizer updates be the module's weights, where both have one dtype and device."""
    import torch.distributed as dist

    shares = [
        partitions[dist.get_rank(group=group)]
        for partitions, group in zip(
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.real_dp_process_group,
            strict=True,
        )
    ]
    pairs = list(zip(optimizer.single_partition_of_fp32_groups, shares, strict=True))
    if any((a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape) for a, b in pairs):
        return
    for flat, share in pairs:
        flat.data = share
    optimizer._link_all_hp_params()  # it has views of what was there before


def _sum_gradients_in_place(optimizer: Any) -> None:
    """Choose the buffer that DeepSpeed has for fp32 sums of bf16 gradients for fp32 gradients too."""
    import torch

    dtypes = optimizer.dtype, optimizer.gradient_accumulation_dtype
    if dtypes == (torch.float32, torch.float32) and not optimizer.zenflow:
        optimizer._use_compact_grad_partition_buffer = lambda number: (
            not (
                optimizer.params_in_partition[number]
                and optimizer._is_muon_group(optimizer.params_in_partition[number])
            )
        )
