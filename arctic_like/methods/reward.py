"""Losses of reward models: scores of answers, of rankings and of single steps. Nothing is averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_like.methods.pairs import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100


def bradley_terry(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, center: float = 0.0
) -> Tensor:
    """-log σ(r_chosen - r_rejected - m) + η (r_chosen + r_rejected)², (pairs,): Bradley and Terry 1952, as in
    Ouyang et al. 2022 (arXiv:2203.02155), eq. 1.

    chosen, rejected: rewards (pairs,). margin: m (pairs,), by how much the one was judged better
    (Touvron et al. 2023, Llama 2, arXiv:2307.09288, eq. 2). center: η, which brings rewards to mean 0
    (Eisenstein et al. 2023, arXiv:2312.09244; TRL's center_rewards_coefficient).
    """
    differences = chosen - rejected
    losses = -log_sigmoid(differences if margin is None else differences - margin)
    return losses + center * (chosen + rejected).square() if center else losses


def plackett_luce(rewards: Tensor, *, present: Tensor | None = None) -> Tensor:
    """-log P(ranking) = -Σ_k (r_k - log Σ_{j ≥ k} exp r_j), (rankings,): Plackett 1975, Luce 1959; eq. 18
    of Rafailov et al. 2023 (arXiv:2305.18290).

    rewards: (rankings, K), best first. present: (rankings, K) bool, where a ranking has an answer;
    None: everywhere. A ranking of one answer has the loss 0, one of two that of `bradley_terry`.
    """
    import torch

    count = rewards.shape[1]
    if present is None:
        present = torch.ones_like(rewards, dtype=torch.bool)
    rewards = torch.where(present, rewards, 0.0)
    behind = torch.ones(count, count, dtype=torch.bool, device=rewards.device).triu()
    # each place competes with itself also where it is empty, so that no sum is over nothing (NaN)
    itself = torch.eye(count, dtype=torch.bool, device=rewards.device)
    competes = (behind & present[:, None, :]) | itself
    totals = torch.where(competes, rewards[:, None, :], -torch.inf).logsumexp(-1)
    return torch.where(present, totals - rewards, 0.0).sum(1)


def pairwise(rewards: Tensor) -> Tensor:
    """The mean of -log σ(r_j - r_k) over the K (K - 1) / 2 pairs of a ranking in which j stands before k,
    (rankings,): Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. rewards: (rankings, K), best first.
    """
    import torch

    count = rewards.shape[1]
    better, worse = torch.triu_indices(count, count, offset=1, device=rewards.device)
    return bradley_terry(rewards[:, better], rewards[:, worse]).mean(1)


def step_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the ends of steps, (batch, length) in at least float32, 0 where no step ends.

    For process rewards (Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050):
    each step of a solution is good, bad, or what classes there are. logits: (batch, length, classes);
    labels: (batch, length) int64, the class at a step's last token and -100 elsewhere. No shift: the last
    token of a step is what judges it.
    """
    import torch
    import torch.nn.functional as F

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(labels.shape)


def step_scores(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy at the ends of steps, (batch, length) in at least float32, 0 elsewhere.

    Wang et al. 2024 (Math-Shepherd, arXiv:2312.08935), eq. 2. scores: (batch, length), logits that a
    step is good; labels: (batch, length), its probability in [0, 1] at a step's last token (soft labels are
    welcome) and -100 elsewhere.
    """
    import torch

    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    labelled = labels != IGNORE
    target = torch.where(labelled, labels, 0).to(wide)
    losses = -target * log_sigmoid(wide) - (1 - target) * log_sigmoid(-wide)
    return torch.where(labelled, losses, 0.0)
