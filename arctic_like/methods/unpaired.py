"""Losses of answers that are each judged for themselves.

ratios: log π(y|x) - log π_ref(y|x), (answers,) float32 or float64. desirable: (answers,) bool, or integers
1 and 0. Each returns the losses (answers,), not averaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arctic_like.methods.pairs import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def kto(
    ratios: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    baseline: Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv:2402.01306), eq. 7: λ_D σ(-β(r - z)) for a desirable answer,
    λ_U σ(β(r - z)) for an undesirable one.

    baseline: z, the estimate of KL(π || π_ref) (`kl_baseline`), of the whole global batch and without
    gradient.
    """
    sign = _sign(ratios, desirable)
    weight = _chosen_by(desirable, ratios, desirable_weight, undesirable_weight)
    return weight * (-sign * beta * (ratios - baseline)).sigmoid()


def apo_zero_unpaired(
    ratios: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7, term by term: KTO whose baseline
    is 0."""
    return kto(
        ratios,
        desirable,
        beta=beta,
        baseline=0.0,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def bco(
    ratios: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    delta: Tensor | float,
    weights: Tensor | None = None,
) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), section 4: -log σ(βr - δ) for a desirable answer,
    -log σ(-(βr - δ)) for an undesirable one.

    delta: the reward shift, without gradient (`bco_shift`). weights: (answers,) of the density ratio
    that brings prompts of undesirable answers to those of desirable ones (the paper's underlying
    distribution matching); the classifier that finds it is the caller's.
    """
    losses = -log_sigmoid(_sign(ratios, desirable) * (beta * ratios - delta))
    return losses if weights is None else losses * weights


def kl_baseline(mismatched_ratios: Tensor) -> Tensor:
    """KTO's z, as the paper estimates it: max(0, mean of log π(y'|x) - log π_ref(y'|x)) over prompts
    with answers of other prompts; a scalar without gradient.

    mismatched_ratios: (n,), of the whole global batch.
    """
    return mismatched_ratios.detach().mean().clamp(min=0)


def bco_shift(ratios: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    """BCO's δ, section 4: the mean reward of the desirable and the mean reward of the undesirable answers of
    the global batch, averaged; a scalar without gradient. Of a kind that is missing nothing counts."""
    import torch

    rewards, wanted = beta * ratios.detach(), desirable.bool()
    kinds = torch.stack([wanted, ~wanted])
    counts = kinds.sum(1)
    means = (kinds * rewards).sum(1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


def _sign(ratios: Tensor, desirable: Tensor) -> Tensor:
    return _chosen_by(desirable, ratios, 1.0, -1.0)


def _chosen_by(desirable: Tensor, like: Tensor, wanted: float, unwanted: float) -> Tensor:
    import torch

    return torch.where(
        desirable.bool(), torch.full_like(like, wanted), torch.full_like(like, unwanted)
    )
