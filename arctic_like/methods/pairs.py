"""What the losses of pairs are made of: log-probabilities of two answers to one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities log π(y|x) of answers, summed over their trained tokens; each (pairs,).

    chosen, rejected: of the model that is trained, float32 or float64, with gradient.
    ref_chosen, ref_rejected: of the reference model, without gradient; None where there is none.
    chosen_tokens, rejected_tokens: how many trained tokens each sum has; None where no loss asks.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None

    def references(self) -> tuple[Tensor, Tensor]:
        """The reference's log-probabilities of the chosen and of the rejected answers. Raises RunError
        where they were not given."""
        if self.ref_chosen is None or self.ref_rejected is None:
            raise RunError(
                "this loss compares with a reference model, whose log-probabilities were not given; "
                "give ref_chosen and ref_rejected, or take a loss without reference (simpo, orpo, cpo)"
            )
        return self.ref_chosen, self.ref_rejected

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log π(y|x) - log π_ref(y|x) of the chosen and of the rejected answers."""
        ref_chosen, ref_rejected = self.references()
        return self.chosen - ref_chosen, self.rejected - ref_rejected

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Trained tokens of the chosen and of the rejected answers, in the dtype of the
        log-probabilities and at least 1. Raises RunError where they were not given."""
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise RunError(
                "this loss divides by the number of tokens, which was not given; "
                "give chosen_tokens and rejected_tokens"
            )
        chosen, rejected = self.chosen_tokens, self.rejected_tokens
        return chosen.to(self.chosen).clamp(min=1), rejected.to(self.rejected).clamp(min=1)

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token of the chosen and of the rejected answers."""
        chosen_length, rejected_length = self.lengths()
        return self.chosen / chosen_length, self.rejected / rejected_length


def log_sigmoid(values: Tensor) -> Tensor:
    """log σ(x) without overflow: x for very negative x."""
    import torch.nn.functional as F

    return F.logsigmoid(values)


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(z) - ε log σ(-z): the logistic loss where labels are swapped with probability ε."""
    if label_smoothing == 0:
        return -log_sigmoid(logits)
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)
