"""Losses of a tile of logits, with their gradients in closed form.

A tile loss is called with logits that it may overwrite, and says how much of their size it needs besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from arctic_like.kernels.tiles import Head, Logits

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["forward", "reverse", "jsd"]
"""KL(teacher ‖ student), KL(student ‖ teacher), or between them: the generalised Jensen-Shannon."""


class TileLoss(Protocol):
    """A loss that is a sum over tokens of functions of the token's logits."""

    parts: int
    """Rows of what it returns."""
    buffers: float
    """Arrays of the logits' size that it needs besides them."""

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        """(parts, n): the losses of the tokens `rows`, then further values of theirs, which have no
        gradient. Leaves in `logits` (n, vocabulary) each loss's gradient for them if `gradient`, else
        anything."""


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """-log p(target). targets: (tokens,) int64, all of them trained."""

    targets: Tensor
    parts = 1
    buffers = 0.0

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        """See `TileLoss`. The gradient is p - onehot(target)."""
        targets = self.targets[rows].unsqueeze(1)
        top = logits.amax(1, keepdim=True)
        wanted = logits.gather(1, targets)
        mass = logits.sub_(top).exp_().sum(1, keepdim=True)
        if gradient:
            logits.div_(mass)
            logits.scatter_(1, targets, logits.gather(1, targets) - 1)
        return (mass.log() + (top - wanted)).t()


class Distance:
    """How far the student's distribution is from the teacher's, both softened by a temperature.

    hidden: (tokens, hidden) of the teacher, whose head may have another width and the same vocabulary.
    With P the teacher's, Q the student's, M = β P + (1 - β) Q: `forward` is KL(P ‖ Q), `reverse` is
    KL(Q ‖ P), `jsd` is β KL(P ‖ M) + (1 - β) KL(Q ‖ M) (GKD, arXiv 2306.13649, section 2). Not
    multiplied by temperature².
    """

    parts = 1
    buffers = 7.0

    def __init__(
        self, hidden: Tensor, head: Head, *, rows: int, kind: Divergence = "forward",
        temperature: float = 1.0, beta: float = 0.5,
    ) -> None:  # fmt: skip
        self._hidden, self._teacher = hidden, Logits(head, rows)
        self._kind, self._temperature, self._beta = kind, temperature, beta

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        """See `TileLoss`."""
        student = logits.div_(self._temperature).log_softmax(1)
        teacher = self._teacher.of(self._hidden[rows]).div_(self._temperature).log_softmax(1)
        if self._kind == "forward":
            q, p = student.exp(), teacher.exp()
            found = teacher.sub_(student).mul_(p).sum(1)
            if gradient:
                logits.copy_(q).sub_(p).div_(self._temperature)
            return found[None]
        # f = Σ Q g, up to a constant of the sum: df / d logit_v = Q_v (g_v - Σ Q g) / temperature
        if self._kind == "reverse":
            found, slope = self._reverse(student, teacher)
        else:
            found, slope = self._jsd(student, teacher)
        if gradient:
            q = student.exp_()
            mean = logits.copy_(slope).mul_(q).sum(1, keepdim=True)
            logits.copy_(slope).sub_(mean).mul_(q).div_(self._temperature)
        return found[None]

    def _reverse(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        slope = teacher.neg_().add_(student)  # log Q / P
        return (student.exp() * slope).sum(1), slope

    def _jsd(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        beta = self._beta
        middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        of_teacher = (teacher - middle).mul_(teacher.exp_()).sum(1)
        slope = middle.neg_().add_(student)  # log Q / M
        found = beta * of_teacher + (1 - beta) * (student.exp() * slope).sum(1)
        return found, slope.mul_(1 - beta)


class Mixture:
    """A weighted sum of tile losses; its further values are each one's own loss, unweighted."""

    def __init__(self, *weighted: tuple[float, TileLoss]) -> None:
        self._weighted = weighted
        self.parts = 1 + len(weighted)
        self.buffers = 2.0 + max(loss.buffers for _, loss in weighted)

    def __call__(self, logits: Tensor, rows: slice, *, gradient: bool) -> Tensor:
        """See `TileLoss`."""
        import torch

        found, kept = [], logits.clone()
        for number, (weight, loss) in enumerate(self._weighted):
            last = number == len(self._weighted) - 1
            own = logits if number == 0 else kept if last else kept.clone()
            found.append(loss(own, rows, gradient=gradient)[0])
            if gradient:
                own.mul_(weight)
                if number:
                    logits.add_(own)
        total = sum(w * value for (w, _), value in zip(self._weighted, found, strict=True))
        return torch.stack([total, *found])  # type: ignore[list-item]
