"""Losses of a pair that need no reference model.

Each takes `Pairs` and numbers by keyword and returns the losses (pairs,), not averaged. The likelihood
term of ORPO and CPO is `paired.sft`, whose `mean_tokens` says what length it is divided by. Finite, with
finite gradients, for log-probabilities down to -1e4 and up to 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from arctic_like.methods.divergence import alpha_divergence
from arctic_like.methods.paired import sft
from arctic_like.methods.pairs import Pairs, log_sigmoid, smoothed

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.methods.divergence import Score


def odds_ratio(pairs: Pairs) -> Tensor:
    """ORPO's L_OR, Hong et al. 2024 (arXiv:2403.07691), eq. 7:
    -log σ(log odds(chosen) - log odds(rejected)), odds(y) = p / (1 - p) with p the geometric mean of the
    tokens' probabilities (eq. 4)."""
    chosen, rejected = pairs.means()
    return -log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


def orpo(pairs: Pairs, *, beta: float, mean_tokens: Tensor | float | None = None) -> Tensor:
    """ORPO, the same paper, eq. 6: the chosen answer's negative log-likelihood plus β L_OR (β is the
    paper's λ).

    The likelihood is that of the answer, as P(y|x) in the paper; TRL counts the prompt's tokens too.
    """
    return sft(pairs, mean_tokens=mean_tokens) + beta * odds_ratio(pairs)


def simpo(
    pairs: Pairs,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    mean_tokens: Tensor | float | None = None,
) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv:2405.14734), eq. 6: -log σ(β(m_chosen - m_rejected) - γ), m the
    log-probability per token.

    nll_weight: of the chosen answer's likelihood; above 0 this is CPO-SimPO. label_smoothing as in
    `paired.sigmoid`, which TRL has too and the paper has not.
    """
    losses = smoothed(beta * _mean_margin(pairs) - gamma, label_smoothing)
    return _with_likelihood(losses, pairs, nll_weight, mean_tokens)


def alphapo(
    pairs: Pairs,
    *,
    beta: float,
    gamma: float,
    shape: float,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
    mean_tokens: Tensor | float | None = None,
) -> Tensor:
    """AlphaPO, Gupta et al. 2025 (arXiv:2501.03884): SimPO with (1 - p^-α) / α in place of m = log p,
    where α is `shape` and p the geometric mean of the tokens' probabilities. α = 0 is SimPO. Exponents
    end where those of `divergence.alpha_divergence` do."""

    def shaped(means: Tensor) -> Tensor:
        return alpha_divergence(means, alpha=1 - shape)

    losses = smoothed(beta * _mean_margin(pairs, shaped) - gamma, label_smoothing)
    return _with_likelihood(losses, pairs, nll_weight, mean_tokens)


def cpo(
    pairs: Pairs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    mean_tokens: Tensor | float | None = None,
) -> Tensor:
    """CPO, Xu et al. 2024 (arXiv:2401.08417), eq. 3: -log σ(β(log π(chosen) - log π(rejected))) plus the
    chosen answer's negative log-likelihood times `nll_weight`, with log-probabilities of whole answers.

    The likelihood is divided by a length (`paired.sft`), as in TRL; the paper writes the sum.
    """
    losses = smoothed(beta * (pairs.chosen - pairs.rejected), label_smoothing)
    return _with_likelihood(losses, pairs, nll_weight, mean_tokens)


def cpo_hinge(
    pairs: Pairs,
    *,
    beta: float,
    nll_weight: float = 1.0,
    mean_tokens: Tensor | float | None = None,
) -> Tensor:
    """`cpo` with the hinge of SLiC-HF (`paired.hinge`) in place of the logistic loss; as in TRL."""
    losses = (1 - beta * (pairs.chosen - pairs.rejected)).relu()
    return _with_likelihood(losses, pairs, nll_weight, mean_tokens)


def cpo_ipo(
    pairs: Pairs,
    *,
    beta: float,
    nll_weight: float = 1.0,
    mean_tokens: Tensor | float | None = None,
) -> Tensor:
    """`cpo` with the square of IPO (`paired.ipo`) of log-probabilities per token; as in TRL."""
    losses = (_mean_margin(pairs) - 1 / (2 * beta)).square()
    return _with_likelihood(losses, pairs, nll_weight, mean_tokens)


def _mean_margin(pairs: Pairs, score: Score | None = None) -> Tensor:
    chosen, rejected = pairs.means()
    return chosen - rejected if score is None else score(chosen) - score(rejected)


def _with_likelihood(
    losses: Tensor, pairs: Pairs, nll_weight: float, mean_tokens: Tensor | float | None
) -> Tensor:
    if nll_weight == 0:
        return losses
    return losses + nll_weight * sft(pairs, mean_tokens=mean_tokens)


def _log_odds(means: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p ≤ 0, any shape. Above -ε (of the dtype) the odds grow no
    more."""
    import torch

    # Both branches are computed for every element, and a NaN in the gradient of the one that is not
    # taken would win: so each gets arguments that it can bear (Mächler 2012, "log1mexp", for the border).
    border = -math.log(2)
    small = means.clamp(max=border)
    large = means.clamp(min=border, max=-torch.finfo(means.dtype).eps)
    rest = torch.where(
        means < border, torch.log1p(-torch.exp(small)), torch.log(-torch.expm1(large))
    )
    return means - rest
