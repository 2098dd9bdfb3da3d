"""Losses of a pair that compare with a reference model.

Each takes `Pairs` and numbers by keyword and returns the losses (pairs,), not averaged. r is the log-ratio
log π(y|x) - log π_ref(y|x); `score` is what an f-divergence puts in its place (`divergence`), and
Δ = score(r_chosen) - score(r_rejected). Finite, with finite gradients, for log-ratios of ±1e4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_like.errors import Problem, RecipeError
from arctic_like.methods.divergence import Score, reverse_kl
from arctic_like.methods.pairs import Pairs, log_sigmoid, smoothed

if TYPE_CHECKING:
    from torch import Tensor


def sigmoid(
    pairs: Pairs, *, beta: float, label_smoothing: float = 0.0, score: Score = reverse_kl
) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv:2305.18290), eq. 7: -log σ(βΔ).

    label_smoothing: conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"):
    -(1 - ε) log σ(βΔ) - ε log σ(-βΔ). TRL's `sigmoid` leaves label_smoothing out without a word.
    """
    return smoothed(beta * _difference(pairs, score), label_smoothing)


def hinge(pairs: Pairs, *, beta: float, score: Score = reverse_kl) -> Tensor:
    """SLiC-HF, Zhao et al. 2023 (arXiv:2305.10425), section 2, on log-ratios as in Liu et al. 2023
    (RSO, arXiv:2309.06657): max(0, 1 - βΔ). The margin 1 is as wide as 1/β in Δ."""
    return (1 - beta * _difference(pairs, score)).relu()


def ipo(pairs: Pairs, *, beta: float, score: Score = reverse_kl) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv:2310.12036), eq. 17, with β for τ: (Δ - 1/(2β))².

    Δ is per token here, each answer's score divided by its length, as in TRL; the paper writes sums.
    TRL's authors report that those of the paper confirmed the division.
    """
    return (_mean_difference(pairs, score) - 1 / (2 * beta)).square()


def sigmoid_norm(
    pairs: Pairs, *, beta: float, label_smoothing: float = 0.0, score: Score = reverse_kl
) -> Tensor:
    """Length-normalised DPO, Lambert et al. 2024 (Tülu 3, arXiv:2411.15124), section 5.1: DPO whose
    scores are divided by the lengths of their answers."""
    return smoothed(beta * _mean_difference(pairs, score), label_smoothing)


def exo_pair(
    pairs: Pairs, *, beta: float, label_smoothing: float, score: Score = reverse_kl
) -> Tensor:
    """EXO, Ji et al. 2024 (arXiv:2402.00856), eq. 16: the reverse KL from the labels (1 - ε, ε) to
    (σ(βΔ), σ(-βΔ)). Raises RecipeError unless 0 < ε < 1; the paper has 1e-3."""
    if not 0 < label_smoothing < 1:
        raise RecipeError(_no_smoothing(label_smoothing))
    logits = beta * _difference(pairs, score)
    chosen = logits.sigmoid() * (log_sigmoid(logits) - math.log1p(-label_smoothing))
    return chosen + (-logits).sigmoid() * (log_sigmoid(-logits) - math.log(label_smoothing))


def robust(
    pairs: Pairs, *, beta: float, label_smoothing: float, score: Score = reverse_kl
) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv:2403.00409), section 3.1:
    (-(1 - ε) log σ(βΔ) + ε log σ(-βΔ)) / (1 - 2ε), whose mean over labels that were swapped with
    probability ε is the loss of the true ones. Raises RecipeError unless 0 ≤ ε < 1/2."""
    if not 0 <= label_smoothing < 0.5:
        raise RecipeError(_too_noisy(label_smoothing))
    logits = beta * _difference(pairs, score)
    clean = -(1 - label_smoothing) * log_sigmoid(logits)
    return (clean + label_smoothing * log_sigmoid(-logits)) / (1 - 2 * label_smoothing)


def nca_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """NCA of pairs, Chen et al. 2024 (arXiv:2402.05369), section 4.1:
    -log σ(βr_chosen) - ½ log σ(-βr_chosen) - ½ log σ(-βr_rejected)."""
    chosen, rejected = _rewards(pairs, beta)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(pairs: Pairs, *, beta: float, delta: Tensor | float | None = None) -> Tensor:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), section 4:
    -log σ(βr_chosen - δ) - log σ(-(βr_rejected - δ)).

    delta: the reward shift, without gradient; None is `reward_shift` of these pairs, which must then be
    those of the whole global batch. Earlier releases of TRL kept a running mean
    (`RunningMean`); TRL 1.16 has δ = 0.
    """
    shift = reward_shift(pairs, beta=beta) if delta is None else delta
    chosen, rejected = _rewards(pairs, beta)
    return -log_sigmoid(chosen - shift) - log_sigmoid(shift - rejected)


def reward_shift(pairs: Pairs, *, beta: float) -> Tensor:
    """BCO's δ (section 4): the mean of the rewards βr of all chosen and rejected answers; a scalar
    without gradient."""
    chosen, rejected = _rewards(pairs, beta)
    return ((chosen.detach() + rejected.detach()) / 2).mean()


@dataclass(frozen=True)
class RunningMean:
    """The mean of all rewards so far, the δ of BCO in earlier releases of TRL. Two numbers to keep in a
    checkpoint; what it is depends on how the steps were cut, which `reward_shift` does not."""

    mean: Tensor | float = 0.0
    count: int = 0

    def updated(self, rewards: Tensor) -> RunningMean:
        """With `rewards`, of any shape, added; without gradient and without synchronisation."""
        added = rewards.numel()
        if added == 0:
            return self
        count = self.count + added
        return RunningMean(
            self.mean + (rewards.detach().mean() - self.mean) * (added / count), count
        )


def sppo_hard(pairs: Pairs, *, beta: float) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv:2405.00675), eq. 4.7 with P = 1 for the winner and 0 for the loser,
    and 1/β for η: (r_chosen - 1/(2β))² + (r_rejected + 1/(2β))²."""
    chosen, rejected = pairs.ratios()
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv:2408.06266), eq. 7: σ(-βr_chosen) + σ(βr_rejected).
    For chosen answers that are better than the model's own."""
    chosen, rejected = _rewards(pairs, beta)
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-down, the same, eq. 8: σ(βr_chosen) + σ(-β(r_chosen - r_rejected)). For chosen answers that
    are worse than the model's own."""
    chosen, rejected = _rewards(pairs, beta)
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def discopop(
    pairs: Pairs, *, beta: float, discopop_tau: float = 0.05, score: Score = reverse_kl
) -> Tensor:
    """DiscoPOP, Lu et al. 2024 (arXiv:2406.08414), eq. 5: with z = βΔ and m = σ(z/τ),
    (1 - m) (-log σ(z)) + m exp(-z).

    The second term is exp(log m - z), which stays finite where exp(-z) does not; for this τ must be
    in (0, 1], otherwise RecipeError.
    """
    if not 0 < discopop_tau <= 1:
        raise RecipeError(
            Problem(
                f"is {discopop_tau}, which is not in (0, 1]",
                place="discopop_tau",
                hint="the paper has 0.05",
            )
        )
    logits = beta * _difference(pairs, score)
    scaled = logits / discopop_tau
    return -(-scaled).sigmoid() * log_sigmoid(logits) + (log_sigmoid(scaled) - logits).exp()


def aot(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT of pairs, Melnyk et al. 2024 (arXiv:2406.05882), section 3: the sorted margins
    log π(chosen) - log π(rejected) against the reference's sorted margins.

    Coupled: all pairs of the global batch at once. The loss of a pair is the one at the place where the
    policy's margin stands. label_smoothing as in `sigmoid`.
    """
    import torch

    ref_chosen, ref_rejected = pairs.references()
    margins, order = torch.sort(pairs.chosen - pairs.rejected, stable=True)
    reference, _ = torch.sort(ref_chosen - ref_rejected, stable=True)
    return smoothed(beta * (margins - reference), label_smoothing)[torch.argsort(order)]


def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT without pairs, the same paper, section 3: the sorted log-ratios of the chosen answers against
    the sorted ones of the rejected. Coupled, as `aot`; a loss stands where its chosen answer does."""
    import torch

    ratios, rejected_ratios = pairs.ratios()
    chosen, order = torch.sort(ratios, stable=True)
    rejected, _ = torch.sort(rejected_ratios, stable=True)
    return smoothed(beta * (chosen - rejected), label_smoothing)[torch.argsort(order)]


def sft(pairs: Pairs, *, mean_tokens: Tensor | float | None = None) -> Tensor:
    """The negative log-likelihood of the chosen answer, divided by a length.

    mean_tokens None: by its own length, the term of Pang et al. 2024 (RPO, arXiv:2404.19733), eq. 1;
    every answer counts alike. A number: by that number, which is the mean length of the chosen answers of the
    global batch; every token counts alike, as in TRL (whose mean ends at the micro-batch).
    """
    if mean_tokens is None:
        return -pairs.means()[0]
    return -pairs.chosen / mean_tokens


def smoothing_problem(loss: str, label_smoothing: float) -> Problem | None:
    """Why a loss does not work with this label smoothing; None if it does."""
    if loss == "exo_pair" and not 0 < label_smoothing < 1:
        return _no_smoothing(label_smoothing)
    if loss == "robust" and not 0 <= label_smoothing < 0.5:
        return _too_noisy(label_smoothing)
    return None


def _difference(pairs: Pairs, score: Score) -> Tensor:
    chosen, rejected = pairs.ratios()
    return score(chosen) - score(rejected)


def _mean_difference(pairs: Pairs, score: Score) -> Tensor:
    chosen, rejected = pairs.ratios()
    chosen_length, rejected_length = pairs.lengths()
    return score(chosen) / chosen_length - score(rejected) / rejected_length


def _rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    chosen, rejected = pairs.ratios()
    return beta * chosen, beta * rejected


def _no_smoothing(value: float) -> Problem:
    return Problem(
        f"is {value}, but exo_pair needs labels that are neither certain nor swapped (above 0, below 1)",
        place="label_smoothing",
        hint="the paper has 1e-3",
    )


def _too_noisy(value: float) -> Problem:
    return Problem(
        f"is {value}, but robust divides by 1 - 2 · label_smoothing and needs 0 ≤ it < 0.5",
        place="label_smoothing",
        hint="the paper has 0.1",
    )
