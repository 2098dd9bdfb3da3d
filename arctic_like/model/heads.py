"""The linear head of a causal language model, called so that its full logits need never exist.

The model is called as always, through whatever wraps it; for that one call its head computes something else
(`through_head`): a loss, say, of the hidden states that it is given. So hooks, adapters and ZeRO-3, which
gathers a module's weight around its forward and its backward, are where they always are. What a model does
with logits behind its head is not read from a list of names but measured: `find_head` puts known numbers
in the head's place and looks at what comes out. What is not `softcap · tanh(scale · x / softcap)` is refused,
with the reason, and such a model's loss takes its full logits.

An adapter of the head (LoRA: h · Wᵀ + s · (h · Aᵀ) · Bᵀ) stays what it is, too: A is called as always, and
what it gives are further columns of the hidden states, which B multiplies (`tiles.Head.low`). The modules
that hold W and B are called one within the other, so that both have their weights where the loss is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError
from arctic_like.kernels.tiles import Head, Logits, detached
from arctic_like.model.isolation import evaluating, packed_inputs
from arctic_like.model.randomness import untouched_randomness

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PROBE_TOKENS = 8
SMALL, LARGE = 2.0**-20, 2.0**40
"""Where a cap is the identity to rounding, and where it is all there is."""
GRID = (-300.0, -50.0, -10.0, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 3.0, 10.0, 50.0, 300.0)
ROUNDING = {"float64": 1e-9, "float32": 1e-3}
"""How far logits may lie apart, relative to the largest; float32 may be TF32. Others: 3e-2."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """Of a head: shrink (…, hidden) → (…, rank) is A with its dropout, scaled; expand is B."""

    shrink: Callable[[Tensor], Tensor]
    expand: nn.Linear


@dataclass(frozen=True, eq=False)
class Parts:
    """What computes a head's logits now: h Wᵀ + b, and its adapter if it has one."""

    linear: nn.Linear
    adapter: Adapter | None = None

    @property
    def layers(self) -> list[nn.Linear]:
        """Whose weights are multiplied by a tile's tokens."""
        return [self.linear] if self.adapter is None else [self.linear, self.adapter.expand]


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A model's head and what follows it: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap).

    module: what the model calls: a linear layer, or what peft put around one.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def parts(self) -> Parts:
        """What computes now: where adapters are disabled, the base alone."""
        found = _parts(self.module)
        if isinstance(found, str):
            raise RunError(f"the model's head changed: {found}")
        return found

    def weights(self, parts: Parts, like: Tensor | None = None) -> Head:
        """The weights as they are now, which at ZeRO-3 is nothing outside the forwards of `parts.layers`.

        like: hidden states; under autocast the weights are cast as theirs are.
        """
        weight, bias = parts.linear.weight, parts.linear.bias
        low = None if parts.adapter is None else parts.adapter.expand.weight
        dtype = weight.dtype if like is None else like.dtype
        cast, low = (None if x is None else x.to(dtype) for x in (bias, low))
        return Head(weight.to(dtype), cast, self.scale, self.softcap, low)


@dataclass(frozen=True)
class Search:
    """What `find_head` came to: a head, or why there is none to be called by itself."""

    head: LinearHead | None = None
    reason: str = ""


def find_head(model: Any, *, device: str) -> Search:
    """The head of a transformers model, if its logits are known to be exactly what `LinearHead` says.

    model: may be wrapped (DeepSpeed's engine, peft). Runs it three times on a few tokens, without
    gradients; modes and random generators stay as they were. At ZeRO-3 all ranks must call it.
    """
    model = unwrapped(model)
    found = _head_of(model)
    if isinstance(found, str):
        return Search(reason=found)
    with evaluating(model), untouched_randomness(), _no_grad():
        return _measured(model, found, device)


def through_head(
    head: LinearHead, call: Callable[[], Any], compute: Callable[[Tensor, Head], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `compute(hidden, head)` gives for the hidden states (tokens, hidden) that `call()`, a call of the
    model, brings to its head. tokens: rows · length, in order.

    Gradients of its tensors reach the head's weights and the model as if they were logits. The output
    of `call` itself has no logits. Raises RunError where the head was not called exactly once.
    """
    import torch

    parts = head.parts
    given: list[tuple[Tensor, ...]] = []
    returned: list[Tensor | tuple[Tensor, ...]] = []

    def forward(hidden: Tensor) -> Any:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        given.append(compute(hidden.flatten(0, -2), head.weights(parts, like=hidden)))
        passed = tuple(value for value in given[-1] if value.requires_grad)
        returned.append(hidden.new_zeros((*hidden.shape[:-1], 1)))
        return passed or returned[-1]

    def adapted(hidden: Tensor) -> Any:
        # B is called within W, so that both have their weights there and in the backward
        assert parts.adapter is not None
        expand, low = parts.adapter.expand, parts.adapter.shrink(hidden)

        def within(own: Tensor) -> Any:
            with _forward_of(expand, lambda more: forward(torch.cat([own, more], dim=-1))):
                return expand(low)

        with _forward_of(parts.linear, within):
            return parts.linear(hidden)

    def last_hook(_: Any, __: Any, output: Any) -> Any:
        # Behind the hooks of ZeRO-3, whose wrapping of the output gathers the weight in the backward.
        stand_in, returned[-1] = returned[-1], output
        return stand_in

    handle = head.module.register_forward_hook(last_hook)
    outer = (parts.linear, forward) if parts.adapter is None else (head.module, adapted)
    try:
        with _forward_of(*outer):
            call()
    finally:
        handle.remove()
    if len(given) != 1:
        kind = type(head.module).__name__
        raise RunError(f"{kind}, the head of the model, was called {len(given)} times in a forward")
    passed = iter(returned[0])
    return tuple(next(passed) if value.requires_grad else value for value in given[0])


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module computes something else; its hooks stay."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


@contextmanager
def gathered(head: LinearHead) -> Iterator[Head]:
    """The head's weights outside its forward, without gradient: at ZeRO-3 whole inside. Collective."""
    parts = head.parts
    parameters = [
        parameter
        for layer in parts.layers
        for parameter in layer.parameters(recurse=False)
        if hasattr(parameter, "ds_id")
    ]
    if not parameters:
        yield detached(head.weights(parts))
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield detached(head.weights(parts))


def unwrapped(model: Any) -> Any:
    """The model inside DeepSpeed's engine or torch's DDP; peft's wrapper is a model and stays."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _head_of(model: Any) -> nn.Module | str:
    """What a model calls for its logits, if what computes there is known; else why not."""
    if hasattr(model, "_orig_mod"):
        return "it is compiled"
    getter = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = getter() if callable(getter) else None
    if head is None:
        return f"{type(model).__name__} does not say what its head is"
    parts = _parts(head)
    return parts if isinstance(parts, str) else head


def _parts(head: Any) -> Parts | str:
    """What computes a head's logits, or why that is not known."""
    disabled = getattr(head, "disable_adapters", False)
    copies = getattr(head, "modules_to_save", None)  # peft: a trained copy stands in for the module
    if copies is not None:
        active = list(getattr(head, "active_adapters", ()))
        if disabled:
            return _plain(head.original_module)
        if len(active) != 1 or active[0] not in copies:
            return f"its head has {len(active)} active copies"
        return _plain(copies[active[0]])
    if not hasattr(head, "lora_A"):
        return _plain(head)
    base = _plain(head.base_layer)
    if isinstance(base, str) or disabled:
        return base
    return _low_rank(head, base)


def _plain(head: Any) -> Parts | str:
    from torch import nn

    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, no plain linear layer"
    if "forward" in vars(head):
        return "its head's forward was replaced"
    return Parts(head)


def _low_rank(head: Any, base: Parts) -> Parts | str:
    """Of peft's LoRA around a linear layer, as its own forward computes it."""
    from peft.tuners.lora.layer import Linear

    active = [name for name in head.active_adapters if name in head.lora_A]
    if type(head).forward is not Linear.forward or head.merged or len(active) != 1:
        return f"its head is a {type(head).__name__} of {len(active)} adapters"
    (name,) = active
    if name in getattr(head, "lora_variant", {}):
        return f"its head's adapter is a {type(head.lora_variant[name]).__name__}"
    first, last, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
    scaling = head.scaling[name]
    if last.bias is not None or last.weight.dtype != base.linear.weight.dtype:
        return "its head's adapter has a bias, or another dtype than the head"

    def shrink(hidden: Tensor) -> Tensor:
        found: Tensor = first(dropout(hidden)) * scaling
        return found

    return Parts(base.linear, Adapter(shrink, last))


def _measured(model: Any, module: nn.Module, device: str) -> Search:
    import torch

    vocabulary = LinearHead(module).parts.linear.out_features
    tokens = torch.arange(PROBE_TOKENS, device=device)[None]
    inputs = packed_inputs(model, tokens % vocabulary, tokens)
    grid = torch.tensor([SMALL, LARGE, *GRID], dtype=torch.float64, device=device)
    count = PROBE_TOKENS * vocabulary
    places = torch.arange(count, device=device)
    places = torch.where(places < 2, places, 2 + places * 7919 % len(GRID))
    values, shapes = grid[places], []

    def known(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        shapes.append(tuple(hidden.shape[:-1]))
        fits = math.prod(shapes[-1]) == PROBE_TOKENS
        shape = (*shapes[-1], vocabulary)
        return values.view(shape) if fits else values.new_zeros(shape)

    with _forward_of(module, known):
        found = model(**inputs).logits
    if len(shapes) != 1:
        return Search(reason=f"its forward calls its head {len(shapes)} times")
    if math.prod(shapes[0]) != PROBE_TOKENS:
        return Search(reason=f"{PROBE_TOKENS} tokens reach its head in the shape {shapes[0]}")
    if found.numel() != count:
        return Search(reason=f"its logits have the shape {tuple(found.shape)}")
    found = found.double().flatten()
    scale, far = float(found[0]) / SMALL, float(found[1])
    capped = abs(far) < abs(scale) * LARGE / 2
    expected = scale * values
    if capped:
        expected = far * torch.tanh(expected / far)
    if scale == 0 or not bool(((found - expected).abs() <= 1e-6 * expected.abs()).all()):
        return Search(
            reason="its logits are neither its head's output, nor a multiple or a cap of it"
        )
    # what was float32 on the way is rounded to it
    head = LinearHead(module, _short(scale), _short(far) if capped else None)
    return _proved(model, head, inputs)


def _proved(model: Any, head: LinearHead, inputs: dict[str, Any]) -> Search:
    """The head, if calling it by itself gives the model's own logits."""
    true = model(**inputs).logits
    (found,) = through_head(
        head,
        lambda: model(**inputs),
        lambda hidden, own: (Logits(own, len(hidden)).of(hidden),),
    )
    true = true.to(found.dtype).flatten(0, -2)
    apart = float((found - true).abs().max())
    allowed = ROUNDING.get(str(head.parts.linear.weight.dtype).removeprefix("torch."), 3e-2)
    if not apart <= allowed * float(true.abs().max()):
        return Search(reason=f"its logits lie {apart:.2g} from its head's")
    return Search(head)


def _short(value: float) -> float:
    """A short decimal number in place of one that rounding moved from it."""
    short = float(f"{value:.7g}")
    return short if abs(short - value) <= 1e-8 * abs(value) else value


def _no_grad() -> torch.no_grad:
    import torch

    return torch.no_grad()
