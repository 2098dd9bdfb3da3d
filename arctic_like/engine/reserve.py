"""Memory for optimizer states before there are any.

Optimizers make their states in their first step, after the activations are gone. A first forward and backward
that fits would say little of the second. So the memory is taken before the first one and given back
just before the states are made: what does not fit fails at the first step.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from arctic_like.engine.random_state import preserved

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.optim import Optimizer

PROBE = (128, 64)
"""Elements enough that 8-bit optimizers do not keep full precision as they do for small tensors."""


def reserved_states(optimizer: Optimizer, weights: list[Tensor]) -> list[Tensor]:
    """Uninitialised tensors of the size of the states that the first step will make of `weights` (master
    weights, as the optimizer gets them), on their devices. Empty where the optimizer does not say."""
    import torch

    made = []
    known: dict[tuple[Any, ...], list[torch.dtype]] = {}
    for weight in weights:
        if weight in optimizer.state:
            continue
        kind = (weight.dtype, weight.device, weight.ndim > 1)
        if kind not in known:
            known[kind] = _states_of(optimizer, weight)
        made += [torch.empty_like(weight, dtype=dtype) for dtype in known[kind]]
    return made


def _states_of(optimizer: Optimizer, weight: Tensor) -> list[torch.dtype]:
    """The dtypes of the states, as large as a weight, that this kind of optimizer keeps of one like
    `weight`: found out by a step on a small one. Smaller states do not count."""
    import torch

    group = next(iter(optimizer.param_groups), {})
    options = {key: value for key, value in group.items() if key != "params"}
    probe = torch.nn.Parameter(
        torch.zeros(PROBE if weight.ndim > 1 else PROBE[0] * PROBE[1],
                    dtype=weight.dtype, device=weight.device)
    )  # fmt: skip
    probe.grad = torch.zeros_like(probe)
    try:
        with preserved(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one: Any = type(optimizer)([{"params": [probe], **options}])  # type: ignore[call-arg]
            one.step()
            states = one.state[probe].values()
            return [s.dtype for s in states if torch.is_tensor(s) and s.shape == probe.shape]
    except Exception:  # arguments of its own, a device it does not know
        return []
