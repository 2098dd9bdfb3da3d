"""What is reserved before the first step is what the first step makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from arctic_like.engine.reserve import reserved_states

KINDS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_large_as_the_states(kind: str, dtype: torch.dtype) -> None:
    """A matrix and what ZeRO makes of one, flat; by sizes and dtypes, tensors of a few numbers left out."""
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((96, 200), (5000,))]
    optimizer = KINDS[kind]([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.01}])
    generator = torch.get_rng_state()
    reserved = Counter((one.numel(), one.dtype) for one in reserved_states(optimizer, weights))
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), generator)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    made = Counter(
        (value.numel(), value.dtype)
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() > 1000
    )
    assert reserved == made
    assert reserved_states(optimizer, weights) == []


def test_an_optimizer_that_needs_more_to_be_made_reserves_nothing() -> None:
    class Own(torch.optim.SGD):
        def __init__(self, params: Any, needed: int) -> None:
            super().__init__(params, lr=0.1, momentum=0.9)

    weights = [nn.Parameter(torch.zeros(3))]
    assert reserved_states(Own(weights, 1), weights) == []
