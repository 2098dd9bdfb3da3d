"""What of the forward pass is kept for the backward: all of it, layers' inputs, or what is dear to compute.

A layer whose activations are checkpointed keeps its input alone and is computed again in the backward.
`selective` keeps the results of matrix products and attention as well, so that only what is cheap is
computed again (norms, activations, rotations). The inputs themselves can lie in host memory meanwhile.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

How = Literal["full", "selective", "none"] | int
DEAR = (
    "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward",
    "_efficient_attention_forward",
)  # fmt: skip
"""Operations of aten whose results `selective` keeps."""
LEAST_BYTES = 1 << 20
"""Smaller tensors stay on the device."""


def checkpoint_activations(model: PreTrainedModel, how: How) -> None:
    """Let a model of transformers checkpoint its layers' activations: `full`, every `how`-th layer, or
    `selective`. Raises RecipeError where the architecture cannot."""
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(_contexts, _dear_operations())
    # Renamed in transformers 5.18 or later; the old name warns from then on and goes in 6.
    enable: Callable[[dict[str, Any]], None] = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    try:
        enable(options)
    except ValueError as error:
        raise RecipeError(
            Problem(
                f"{model.config.model_type} cannot checkpoint activations",
                place="model.activation_checkpointing",
                hint="set it to none",
            )
        ) from error
    if isinstance(how, int):
        for number, layer in enumerate(_layers(model)):
            layer.gradient_checkpointing = number % how == 0  # type: ignore[assignment]


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that are checkpointed one by one, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def _dear_operations() -> frozenset[Any]:
    import torch

    from arctic_like.model.attention import available

    found = [getattr(torch.ops.aten, name, None) for name in DEAR]
    if available():  # `varlen` attention is an operation of its own, around aten's
        found.append(getattr(torch.ops.torch_attn, "_varlen_attn", None))
    return frozenset(packet.default for packet in found if packet is not None)


def _contexts(dear: frozenset[Any]) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        keep = operation in dear
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    make: Callable[..., Any] = create_selective_checkpoint_contexts
    return make(policy)


def offload_checkpoints(model: nn.Module) -> None:
    """Keep the inputs of checkpointed layers in host memory between forward and backward.

    Raises RecipeError where nothing is checkpointed.
    """
    store = HostStore()
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        plain = getattr(layer, "_gradient_checkpointing_func", None)
        if plain is not None:
            layer._gradient_checkpointing_func = functools.partial(_offloaded, store, plain)  # type: ignore[assignment]
    if not layers:
        raise RecipeError(
            Problem(
                "is true, and no activations are checkpointed",
                place="activation_checkpoint_cpu_offload",
                hint="leave model.activation_checkpointing at full, or leave this out",
            )
        )


def _offloaded(store: HostStore, checkpoint: Callable[..., Any], *args: Any, **options: Any) -> Any:
    from torch.autograd.graph import saved_tensors_hooks

    # Inside, the checkpoint has hooks of its own: these see its inputs, and nothing that is computed.
    with saved_tensors_hooks(store.pack, store.unpack):
        return checkpoint(*args, **options)


class HostStore:
    """Tensors that are away in host memory, and come back in the reverse order of their going.

    On CUDA both ways run on a stream of their own beside the computation, through page-locked buffers that
    are used again; when one is fetched, the one that went before it is sent for already.
    """

    def __init__(self, *, least_bytes: int = LEAST_BYTES) -> None:
        self.least_bytes = least_bytes
        # Weak: the graph holds what is away, and lets go of it when it has been used.
        self._away: list[weakref.ref[_Away]] = []
        self._free: dict[tuple[int, bool], list[Tensor]] = {}
        self._streams: dict[torch.device, Any] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        """Send a tensor away; small ones, leaves (weights) and whole numbers stay."""
        size = tensor.numel() * tensor.element_size()
        if size < self.least_bytes or not tensor.is_floating_point() or _is_weight(tensor):
            return tensor
        one = _Away(self, tensor, len(self._away))
        self._away.append(weakref.ref(one, self._forget))
        return one

    def unpack(self, kept: Tensor | _Away) -> Tensor:
        """The tensor, on its device again."""
        if not isinstance(kept, _Away):
            return kept
        found = kept.fetch()
        before = self._away[kept.number - 1]() if 0 < kept.number <= len(self._away) else None
        if before is not None:
            before.send_for()
        return found

    def buffer(self, size: int, *, locked: bool) -> Tensor:
        """Host memory of so many bytes, used before if there is any."""
        import torch

        free = self._free.get((size, locked))
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=locked)

    def give_back(self, memory: Tensor, *, locked: bool) -> None:
        """The memory of a tensor that is not wanted any more."""
        self._free.setdefault((memory.numel(), locked), []).append(memory)

    def _forget(self, _: object) -> None:
        while self._away and self._away[-1]() is None:
            self._away.pop()

    def stream(self, device: torch.device) -> Any:
        """The side stream of a device."""
        import torch

        if device not in self._streams:
            cuda: Any = torch.cuda
            self._streams[device] = cuda.Stream(device)
        return self._streams[device]


class _Away:
    """One tensor in host memory."""

    def __init__(self, store: HostStore, tensor: Tensor, number: int) -> None:
        import torch

        self.number = number
        self._store, self._device = store, tensor.device
        self._here: Tensor | None = None
        self._cuda = tensor.device.type == "cuda"
        size = tensor.numel() * tensor.element_size()
        self._memory: Tensor = store.buffer(size, locked=self._cuda)
        self._host = self._memory.view(tensor.dtype).view(tensor.shape)
        if not self._cuda:
            self._host.copy_(tensor)
            return
        side = store.stream(tensor.device)
        side.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(side):
            self._host.copy_(tensor, non_blocking=True)
        tensor.record_stream(side)  # its memory is not given to others before it was read

    def send_for(self) -> None:
        """Begin to bring it back, without waiting."""
        import torch

        if self._here is not None:
            return
        if not self._cuda:
            self._here = self._host.to(self._device, copy=True)
            return
        # On the one side stream this comes after the copy that brought it here. The memory belongs to the
        # computing stream, which waits in `fetch`; what was there before must be done with.
        self._here = torch.empty_like(self._host, device=self._device, pin_memory=False)
        side = self._store.stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._here.copy_(self._host, non_blocking=True)
        self._here.record_stream(side)

    def fetch(self) -> Tensor:
        """The tensor, for the computation that comes next on the current stream."""
        import torch

        self.send_for()
        assert self._here is not None
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._store.stream(self._device))
        return self._here

    def __del__(self) -> None:
        # The graph has let go of it. The buffer's next use is on the same side stream, behind this one's.
        self._store.give_back(self._memory, locked=self._cuda)


def _is_weight(tensor: Tensor) -> bool:
    import torch

    return isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
