"""What the tests of losses share: random pairs, and derivatives by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from arctic_like.methods.pairs import Pairs


def random_pairs(
    seed: int, *, count: int = 5, scale: float = 3.0, dtype: torch.dtype = torch.float64
) -> Pairs:
    """Log-probabilities of answers of 1 to 9 tokens; log-ratios are about `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    lengths = [torch.randint(1, 10, (count,), generator=generator) for _ in range(2)]
    reference = [-2 * tokens * (0.5 + normal().abs()) for tokens in lengths]
    policy = [one + scale * normal() for one in reference]
    policy = [one.to(dtype).requires_grad_() for one in policy]
    return Pairs(*policy, *(one.to(dtype) for one in reference), *lengths)


def pairs_with(
    chosen: list[float], rejected: list[float], *, dtype: torch.dtype = torch.float64
) -> Pairs:
    """Pairs with these log-ratios, whose reference gives every answer of 4 tokens -8."""
    reference = torch.full((len(chosen),), -8.0, dtype=dtype)
    found = [torch.tensor(one, dtype=dtype) + reference for one in (chosen, rejected)]
    tokens = torch.full((len(chosen),), 4)
    leaves = [one.detach().requires_grad_() for one in found]
    return Pairs(*leaves, reference, reference, tokens, tokens)


def derivatives(
    losses: torch.Tensor, pairs: Pairs, weights: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Of the (weighted) sum of losses by the policy's log-probabilities: chosen, rejected."""
    total = losses.sum() if weights is None else (losses * weights).sum()
    found = torch.autograd.grad(
        total, (pairs.chosen, pairs.rejected), allow_unused=True, materialize_grads=True
    )
    return list(found)


def passes_gradcheck(function: Callable[[Pairs], torch.Tensor], pairs: Pairs) -> bool:
    """Whether autograd agrees with finite differences in float64."""

    def of_two(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return function(replace(pairs, chosen=chosen, rejected=rejected))

    leaves = [one.detach().clone().requires_grad_() for one in (pairs.chosen, pairs.rejected)]
    return torch.autograd.gradcheck(of_two, leaves)
