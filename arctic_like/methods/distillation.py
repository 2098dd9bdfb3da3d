"""What a student learns from a teacher: divergences of distributions, and distances of hidden states.

Pure functions of tensors. P is the teacher's distribution, Q the student's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["forward", "reverse", "jsd"]
"""KL(P ‖ Q), KL(Q ‖ P), or between them."""
_NAMES = {"forward": "kl", "reverse": "reverse_kl", "jsd": "jsd"}


def logged_as(kind: Kind) -> str:
    """The name of a divergence in metrics."""
    return _NAMES[kind]


def divergence(student: Tensor, teacher: Tensor, *, kind: Kind, beta: float = 0.5) -> Tensor:
    """How far Q is from P, (tokens,), with gradient to the student.

    student, teacher: (tokens, outcomes) log-probabilities, -inf nowhere. `jsd` is β KL(P ‖ M) + (1 - β)
    KL(Q ‖ M) with M = β P + (1 - β) Q, 0 < β < 1: Agarwal et al. 2024 (arXiv:2306.13649), eq. 1; divided by β
    it goes to KL(P ‖ Q) for β → 0, divided by 1 - β to KL(Q ‖ P) for β → 1.
    """
    import torch

    if kind == "forward":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if kind == "reverse":
        return (student.exp() * (student - teacher)).sum(-1)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = (teacher.exp() * (teacher - middle)).sum(-1)
    return beta * of_teacher + (1 - beta) * (student.exp() * (student - middle)).sum(-1)


def highest(logits: Tensor, *, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """What is kept of a teacher: (tokens (n, k) int64, log-probabilities (n, k) or (n, k + 1) float32, the
    last that of all other tokens together, if there are others).

    logits: (n, vocabulary), softened by the temperature. k: `count`, or the vocabulary where that is less.
    """
    import torch

    logprobs = (logits.double() / temperature).log_softmax(-1)
    found, tokens = logprobs.topk(min(count, logits.shape[-1]), dim=-1)
    if tokens.shape[-1] == logits.shape[-1]:
        return tokens, found.float()
    others = logprobs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return tokens, torch.cat([found, others], dim=-1).float()


def coarse(logits: Tensor, tokens: Tensor, *, temperature: float) -> Tensor:
    """The student's log-probabilities of the outcomes that `highest` kept, (n, k) or (n, k + 1), with
    gradient: those tokens, and all others as one. A divergence of these is at most that of all tokens."""
    import torch

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logprobs = wide.log_softmax(-1)
    found = logprobs.gather(-1, tokens)
    if tokens.shape[-1] == logits.shape[-1]:
        return found
    others = logprobs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([found, others], dim=-1)


def state_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of hidden states, (tokens,): Jiao et al. 2020 (TinyBERT, arXiv:1909.10351),
    eq. 8. student, teacher: (tokens, width), the student's behind its projection where it has one."""
    return (student.float() - teacher.float()).square().mean(-1)
