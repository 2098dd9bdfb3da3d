"""The plain computation that the kernels replace, in whatever dtype it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Case:
    """Hidden states, head and targets, drawn from a seed in float64; `to` gives them in another dtype."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    low: Tensor | None = None

    @classmethod
    def drawn(
        cls, *, tokens: int = 23, width: int = 8, vocabulary: int = 37, bias: bool = False,
        trained: str = "some", seed: int = 0, softcap: float | None = None, scale: float = 1.0,
        rank: int = 0,
    ) -> Case:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        targets = torch.randint(vocabulary, (tokens,), generator=generator)
        dropped = (
            torch.rand(tokens, generator=generator) < {"all": 0, "some": 0.6, "none": 2}[trained]
        )
        targets[dropped] = -100
        return cls(
            normal(tokens, width + rank), normal(vocabulary, width), targets,
            normal(vocabulary) if bias else None, softcap, scale,
            normal(vocabulary, rank) if rank else None,
        )  # fmt: skip

    def to(self, dtype: torch.dtype) -> Case:
        """A copy in the dtype, whose tensors require gradients."""

        def leaf(x: Tensor | None) -> Any:
            return None if x is None else x.detach().to(dtype).clone().requires_grad_()

        return Case(
            leaf(self.hidden), leaf(self.weight), self.targets, leaf(self.bias), self.softcap,
            self.scale, leaf(self.low),
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        """What the kernels take by name."""
        return {
            "bias": self.bias, "softcap": self.softcap, "scale": self.scale, "low": self.low
        }  # fmt: skip

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What may have a gradient."""
        found = {
            "hidden": self.hidden, "weight": self.weight, "bias": self.bias, "low": self.low
        }  # fmt: skip
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: tensor.grad for name, tensor in self.leaves.items()}


def logits(case: Case) -> Tensor:
    """All of them, as a model computes them in its dtype."""
    weight = case.weight if case.low is None else torch.cat([case.weight, case.low], dim=1)
    found = F.linear(case.hidden, weight, case.bias) * case.scale
    return found if case.softcap is None else torch.tanh(found / case.softcap) * case.softcap


def token_losses(case: Case) -> Tensor:
    """(tokens,): the loss of a model's logits in float32, or in float64 for float64."""
    scores = logits(case)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return F.cross_entropy(scores, case.targets, reduction="none")


def distance(
    student: Tensor, teacher: Tensor, kind: str, temperature: float, beta: float
) -> Tensor:
    """(tokens,), term by term from the definition."""
    q, p = (torch.softmax(x / temperature, -1) for x in (student, teacher))

    def kl(left: Tensor, right: Tensor) -> Tensor:
        return (left * (left / right).log()).sum(-1)

    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    middle = beta * p + (1 - beta) * q
    return beta * kl(p, middle) + (1 - beta) * kl(q, middle)
