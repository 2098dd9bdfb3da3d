"""The linear head of a causal language model, called so that its full logits need never exist.

The model is called as always, through whatever wraps it; for that one call its head computes something else
(`through_head`): a loss, say, of the hidden states that it is given. So hooks, adapters and ZeRO-3, which
gathers a module's weight around its forward and its backward, are where they always are. What a model does
with logits behind its head is not read from a list of names but measured: `find_head` puts known numbers
in the head's place and looks at what comes out. What is not `softcap · tanh(scale · x / softcap)` is refused,
with the reason, and such a model's loss takes its full logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arctic_like.errors import RunError
from arctic_like.kernels.tiles import Head, Logits
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
class LinearHead:
    """A model's head and what follows it: logits = softcap · tanh(scale · (h Wᵀ + b) / softcap)."""

    module: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def parameters(self, like: Tensor | None = None) -> Head:
        """The head's weights as they are now, which at ZeRO-3 is nothing outside its forward.

        like: hidden states; under autocast the weights are cast as theirs are.
        """
        weight, bias = self.module.weight, self.module.bias
        dtype = weight.dtype if like is None else like.dtype
        cast = None if bias is None else bias.to(dtype)
        return Head(weight.to(dtype), cast, self.scale, self.softcap)


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
    found = _linear(model)
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

    given: list[tuple[Tensor, ...]] = []
    returned: list[Tensor | tuple[Tensor, ...]] = []

    def forward(hidden: Tensor) -> Any:
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        given.append(compute(hidden.flatten(0, -2), head.parameters(like=hidden)))
        passed = tuple(value for value in given[-1] if value.requires_grad)
        returned.append(hidden.new_zeros((*hidden.shape[:-1], 1)))
        return passed or returned[-1]

    def last_hook(_: Any, __: Any, output: Any) -> Any:
        # Behind the hooks of ZeRO-3, whose wrapping of the output gathers the weight in the backward.
        stand_in, returned[-1] = returned[-1], output
        return stand_in

    handle = head.module.register_forward_hook(last_hook)
    try:
        with _forward_of(head.module, forward):
            call()
    finally:
        handle.remove()
    if len(given) != 1:
        kind = type(head.module).__name__
        raise RunError(f"{kind}, the head of the model, was called {len(given)} times in a forward")
    passed = iter(returned[0])
    return tuple(next(passed) if value.requires_grad else value for value in given[0])


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """The module computes something else; its hooks stay."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


@contextmanager
def gathered(head: LinearHead) -> Iterator[Head]:
    """The head's weights outside its forward, without gradient: at ZeRO-3 whole inside. Collective."""
    parameters = [p for p in head.module.parameters(recurse=False) if hasattr(p, "ds_id")]
    if not parameters:
        yield _detached(head.parameters())
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield _detached(head.parameters())


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach(), bias, head.scale, head.softcap)


def unwrapped(model: Any) -> Any:
    """The model inside DeepSpeed's engine or torch's DDP; peft's wrapper is a model and stays."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _linear(model: Any) -> nn.Linear | str:
    """The linear layer that is a model's head, or why there is none."""
    from torch import nn

    if hasattr(model, "_orig_mod"):
        return "it is compiled"
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if head is None:
        return f"{type(model).__name__} does not say what its head is"
    copies = getattr(head, "modules_to_save", None)  # peft: a trained copy stands in for the module
    if copies is not None and not getattr(head, "disable_adapters", False):
        active = list(getattr(head, "active_adapters", ()))
        if len(active) != 1 or active[0] not in copies:
            return f"its head has {len(active)} active copies"
        head = copies[active[0]]
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return f"its head is a {type(head).__module__}.{type(head).__name__}, no plain linear layer"
    if "forward" in vars(head):
        return "its head's forward was replaced"
    return head


def _measured(model: Any, module: nn.Linear, device: str) -> Search:
    import torch

    tokens = torch.arange(PROBE_TOKENS, device=device)[None]
    inputs = packed_inputs(model, tokens % module.out_features, tokens)
    grid = torch.tensor([SMALL, LARGE, *GRID], dtype=torch.float64, device=device)
    count = PROBE_TOKENS * module.out_features
    places = torch.arange(count, device=device)
    places = torch.where(places < 2, places, 2 + places * 7919 % len(GRID))
    values, shapes = grid[places], []

    def known(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape[:-1]))
        fits = math.prod(shapes[-1]) == PROBE_TOKENS
        shape = (*shapes[-1], module.out_features)
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
    allowed = ROUNDING.get(str(head.module.weight.dtype).removeprefix("torch."), 3e-2)
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
