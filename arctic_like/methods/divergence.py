"""f-divergences from the reference: the score that takes the place of the log-ratio.

Wang et al. 2023, "Beyond Reverse KL" (arXiv:2309.16240): with the divergence D_f the implicit reward is
β f'(π(y|x) / π_ref(y|x)) plus a term of the prompt alone, which only a difference of two answers
cancels. A score is f' as a function of the log-ratio r = log π - log π_ref, any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from arctic_like.errors import Problem, RecipeError
from arctic_like.methods.pairs import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[["Tensor"], "Tensor"]

# Where an exponent is cut: the square of the score, which ipo takes, is still finite. TRL cuts at 80 in
# float32 and not at all in forward_kl.
_LARGEST = {"torch.float32": 36.0, "torch.float64": 300.0}


def reverse_kl(ratios: Tensor) -> Tensor:
    """f'(u) = log u, up to a constant: the score of DPO."""
    return ratios


def alpha_divergence(ratios: Tensor, *, alpha: float) -> Tensor:
    """f'(u) = (u^(α - 1) - 1) / (α - 1): log u at α = 1, 1 - 1/u (forward KL) at α = 0.

    This is TRL's sign and scale. The paper's table 1 has, for 0 < α < 1, (1 - u^-α) / α, which is this
    with 1 - α in place of α. Exponents end at 36 in float32 and 300 in float64, without gradient
    beyond.
    """
    import torch

    power = alpha - 1
    if abs(power) < 1e-6:
        return ratios
    largest = _LARGEST.get(str(ratios.dtype), _LARGEST["torch.float32"])
    return torch.expm1((power * ratios).clamp(max=largest)) / power


def forward_kl(ratios: Tensor) -> Tensor:
    """f'(u) = 1 - 1/u (TRL); the paper's -1/u with the constant that makes it 0 at u = 1."""
    return alpha_divergence(ratios, alpha=0.0)


def js_divergence(ratios: Tensor) -> Tensor:
    """f'(u) = log(2u / (u + 1)) of the Jensen-Shannon divergence (table 1); at most log 2."""
    return math.log(2) + log_sigmoid(ratios)


_SCORES: dict[str, Score] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
}

DIVERGENCES = (*_SCORES, "alpha_divergence")
"""Names as in TRL's `f_divergence_type`."""


def score_of(name: str, *, alpha: float = 0.5) -> Score:
    """The score of a divergence by its name; `alpha` is read by alpha_divergence only. Raises
    RecipeError for a name that is none of `DIVERGENCES`."""
    if name == "alpha_divergence":
        return partial(alpha_divergence, alpha=alpha)
    if name not in _SCORES:
        raise RecipeError(
            Problem(
                f"is '{name}', which is no divergence",
                place="f_divergence_type",
                hint=f"use one of {', '.join(DIVERGENCES)}",
            )
        )
    return _SCORES[name]
