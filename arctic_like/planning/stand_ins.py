"""What stands in for ranks, a GPU and weights while a recipe is rehearsed in one process.

- The process group is torch's "fake" backend: collectives return at once, of any number of ranks.
- A GPU is the CPU by another index (`memory.DEVICE`), so that what lies on the host is told apart.
- Models are built without weights; values that only real ones have (fingerprints, DeepSpeed's comparisons
  between ranks, whether a gradient overflows) are not asked for. Objects are not sent: ranks have the same.
- FlashAttention, which needs CUDA, is a function that keeps exactly what it keeps.

All of it is taken back at the end. The process must not have process groups of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from arctic_like.engine import divided
from arctic_like.errors import RunError
from arctic_like.planning.memory import DEVICE

if TYPE_CHECKING:
    from arctic_like.world import World

FLASH = "planned_attention"
"""The name of the attention that stands in for FlashAttention."""
COMPARISONS = ("assert_ints_same_as_other_ranks", "assert_lst_len_same_as_other_ranks")
ZERO_MODULES = (
    "partition_parameters",
    "partitioned_param_coordinator",
    "stage3",
    "parameter_offload",
)


@contextmanager
def standing_in(world: World) -> Iterator[None]:
    """Inside, DeepSpeed and the parts of a recipe run as rank 0 of `world`, without weights."""
    with ExitStack() as stack:
        stack.enter_context(_group(world))
        if world.device == DEVICE:
            _gpu(stack)
            _offer_varlen(stack)
        _models(stack)
        _deepspeed(stack)
        yield


@contextmanager
def _group(world: World) -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RunError("a plan needs a process of its own: this one has process groups")
    # without LOCAL_SIZE DeepSpeed starts a program at every bucket of ZeRO 3, to count a CPU's parts
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world.size),
              "LOCAL_SIZE": str(world.local_size), "DS_ACCELERATOR": "cpu",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    with patch.dict(os.environ, places):
        import deepspeed
        from deepspeed.comm import comm

        backend = importlib.import_module("deepspeed.comm.torch")

        dist.init_process_group("fake", rank=0, world_size=world.size, store=FakeStore())
        try:
            with patch.object(backend, "build_shm_op", lambda: None):  # it compiles one for CPUs
                deepspeed.init_distributed(
                    dist_backend="gloo", auto_mpi_discovery=False, verbose=False
                )
            yield
        finally:
            dist.destroy_process_group()
            comm.cdb = None
            _forget_groups()
            divided.forget()


def _forget_groups() -> None:
    """DeepSpeed keeps groups that it made; the next world has others."""
    from deepspeed.utils import groups

    for name, value in vars(groups).items():
        if name.startswith("_") and name.endswith(("_GROUP", "_WORLD")) and value is not None:
            setattr(groups, name, {} if isinstance(value, dict) else None)


def _gpu(stack: ExitStack) -> None:
    """DeepSpeed's accelerator and the tiles of a loss, as on a GPU."""
    import torch
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from arctic_like.kernels import tiles

    names: dict[str, Any] = {
        "device_name": lambda *_: DEVICE,
        "current_device_name": lambda *_: DEVICE,
        "current_device": lambda *_: torch.device(DEVICE),
        "device": lambda *_: torch.device(DEVICE),
        # what is on the host is brought to the device before it is added to what is there
        "on_accelerator": lambda _, tensor: tensor.device == torch.device(DEVICE),
    }
    stack.enter_context(patch.multiple(CPU_Accelerator, **names))
    stack.enter_context(patch.dict(tiles.TILE_BYTES, {"cpu": tiles.TILE_BYTES_ELSEWHERE}))
    stack.enter_context(patch.object(tiles, "multiplies_wide", lambda _: True))
    for name in ("tiles", "passes"):
        module = importlib.import_module(f"arctic_like.kernels.{name}")
        stack.enter_context(patch.object(module, "multiply", _multiply))


def _multiply(left: Any, right: Any, *, out: Any, add: bool = False) -> None:
    """The product of bf16 operands into float32 has no scratch space on CUDA; here nothing is computed."""


def _models(stack: ExitStack) -> None:
    import torch
    from torch import nn
    from transformers.utils import import_utils

    from arctic_like.engine import deepspeed as engine
    from arctic_like.model import compiled, heads, loading
    from arctic_like.model.adapters import build, fingerprint
    from arctic_like.trainer import assembly, reference

    # a model does the same with tensors that have no values as with those that have
    stack.enter_context(patch.object(import_utils, "is_fake_tensor", lambda _: False))
    stack.enter_context(patch.object(nn.Module, "_apply", _apply))
    stack.enter_context(patch.object(torch.Tensor, "numpy", _numpy))
    stack.enter_context(patch.object(loading, "from_config", _from_config))
    stack.enter_context(patch.object(loading, "from_pretrained", _from_pretrained))
    # a second step has the states themselves
    stack.enter_context(patch.object(engine, "reserved_states", lambda *_: []))
    stack.enter_context(patch.object(compiled, "compile_blocks", lambda *_, **__: None))
    stack.enter_context(patch.object(heads, "_measured", _described_head))
    stack.enter_context(patch.object(assembly, "prove_sharing", lambda *_, **__: None))
    found = {"digest": "", "weights": {}}
    stack.enter_context(patch.object(fingerprint, "fingerprint", lambda *_, **__: found))
    stack.enter_context(patch.object(fingerprint, "difference", lambda *_: ""))
    stack.enter_context(patch.object(build, "_fill", lambda *_: None))
    stack.enter_context(patch.object(reference, "fingerprint", lambda *_, **__: ""))
    stack.enter_context(patch.object(reference, "prepare_table", lambda *_, **__: _Table()))
    _offer_flash()


def _numpy(tensor: Any, *_: Any, **__: Any) -> Any:
    """The known value of a tensor, else zeros."""
    import numpy as np
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    from arctic_like.planning.known import value_of

    value = value_of(tensor)
    if value is None:
        return np.zeros(tuple(tensor.shape))
    with _disable_current_modes():
        return torch._C.TensorBase.numpy(value)


class _Table:
    """What a reference would have said, were it asked before the run."""

    def of(self, batch: Any) -> Any:
        """(documents,) float64."""
        import torch

        segments = batch["segment_ids"].max(dim=1).values + 1
        return torch.zeros(int(segments.sum()), dtype=torch.float64)


def _from_config(config: Any, *, zero: dict[str, Any] | None, seed: int, **options: Any) -> Any:
    from arctic_like.model.loading import _partitioned, unfilled

    flash = str(options.get("attn_implementation") or "").startswith("flash_attention")
    if flash:
        options["attn_implementation"] = FLASH
    with ExitStack() as stack:
        if zero is not None:
            stack.enter_context(_partitioned(zero))
        return unfilled(config, **options)


def _from_pretrained(name: str, *, config: Any, revision: Any = None, **options: Any) -> Any:
    return _from_config(config, **options), []


def _apply(module: Any, function: Any, recurse: bool = True) -> Any:
    """`nn.Module._apply` for tensors without memory, which torch would exchange for others."""
    import torch

    with torch.no_grad():
        for child in module.children() if recurse else ():
            _apply(child, function)
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            changed = function(parameter.detach())
            if (changed.device, changed.dtype) != (parameter.device, parameter.dtype):
                parameter.data = changed
                parameter.fake_device = changed.device
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return module


def _described_head(model: Any, module: Any, _: str) -> Any:
    """The head as the model's config describes it; in training it is measured."""
    from arctic_like.model.heads import LinearHead, Search

    config = model.config.get_text_config()
    return Search(LinearHead(module, softcap=getattr(config, "final_logit_softcapping", None)))


def _deepspeed(stack: ExitStack) -> None:
    from arctic_like.optimizer import adam

    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    stack.enter_context(patch.object(backend, "broadcast_object_list", lambda *_, **__: None))
    stack.enter_context(patch.object(backend, "init_device_mesh", _mesh))
    for factory in (adam.FusedAdamFactory, adam.CPUAdamFactory):
        stack.enter_context(patch.object(factory, "build", _adamw))
    for name in ZERO_MODULES:
        module = importlib.import_module(f"deepspeed.runtime.zero.{name}")
        for comparison in COMPARISONS:
            if hasattr(module, comparison):
                stack.enter_context(patch.object(module, comparison, lambda *_, **__: None))


def _mesh(_: Any, shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> Any:
    """DeepSpeed's groups of ranks that share layers: of a kind of device, which has no index."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=mesh_dim_names)


def _adamw(self: Any, *, model: Any, device: str, offload: bool) -> Any:
    """torch's AdamW in place of DeepSpeed's kernels: it has the same states."""
    import torch

    from arctic_like.optimizer.adam import adam_arguments

    groups, arguments = adam_arguments(self.config, model)
    return torch.optim.AdamW(groups, **arguments, fused=True)


@functools.cache
def _flash() -> Any:
    """What FlashAttention keeps, of (…, length, size) in any order of the leading dimensions."""
    import torch
    from torch.autograd import Function

    class Flash(Function):
        """Dao 2023 (FlashAttention-2), section 3.1: output and the rows' log-sum-exp are kept."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:
            out = torch.empty_like(query)
            sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
            ctx.save_for_backward(query, key, value, out, sums)
            return out

        @staticmethod
        def backward(ctx: Any, upstream: Any) -> Any:
            query, key, value, *_ = ctx.saved_tensors
            return tuple(torch.empty_like(one) for one in (query, key, value))

    return Flash


def _offer_varlen(stack: ExitStack) -> None:
    """`auto` chooses as on a GPU of today without packages, and `varlen` keeps what its kernel keeps."""
    import torch

    from arctic_like.model import attention, attention_choice

    choose = attention_choice.choose

    def as_on_a_gpu(facts: Any) -> Any:
        return choose(dataclasses.replace(facts, device="cuda", capability=(9, 0)))

    def usable(query: Any) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        return half and query.shape[-1] <= attention.MAX_HEAD_DIM

    def kernel(
        query: Any, key: Any, value: Any, *_: Any, enable_gqa: bool = False, **__: Any
    ) -> Any:
        return _flash().apply(query, key, value)

    stack.enter_context(patch.object(attention_choice, "choose", as_on_a_gpu))
    stack.enter_context(patch.object(attention, "_usable", usable))
    stack.enter_context(patch.object(attention, "_found_kernel", lambda: kernel))


def _offer_flash() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def attention(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> Any:
        # (batch, heads, length, size) → (batch, length, heads, size)
        found = _flash().apply(query, key, value)
        return found.transpose(1, 2).contiguous(), None

    AttentionInterface.register(FLASH, attention)
    AttentionMaskInterface.register(FLASH, lambda *_, **__: None)
