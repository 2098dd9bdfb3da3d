"""The losses of pairs by name, and one way in: a weighted mixture of them.

losses = preference_losses(pairs, {"sigmoid": 1.0, "sft": 0.2}, beta=0.1)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from arctic_like.errors import Problem, RecipeError
from arctic_like.methods import paired, reference_free
from arctic_like.methods.divergence import reverse_kl

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.methods.pairs import Pairs


@dataclass(frozen=True)
class PairLoss:
    """What there is to know of a loss before it is computed."""

    function: Callable[..., Tensor]
    """From `Pairs`, and numbers by keyword, to losses (pairs,)."""
    reference: bool = True
    """Needs the reference model's log-probabilities."""
    normalised: Literal["sum", "mean"] = "sum"
    """Works on log-probabilities of whole answers, or per token (it needs the lengths then)."""
    coupled: bool = False
    """Must be given all pairs of the global batch at once; otherwise it is another loss."""
    weighable: bool = True
    """May be weighted pair by pair; not where a loss belongs to an answer of either pair."""

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The numbers that the function takes, by keyword."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)

    @property
    def divergence(self) -> bool:
        """Whether another f-divergence than the reverse KL has a meaning."""
        return "score" in self.numbers


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(paired.sigmoid),
    "hinge": PairLoss(paired.hinge),
    "ipo": PairLoss(paired.ipo, normalised="mean"),
    "exo_pair": PairLoss(paired.exo_pair),
    "nca_pair": PairLoss(paired.nca_pair),
    "robust": PairLoss(paired.robust),
    "bco_pair": PairLoss(paired.bco_pair, coupled=True),
    "sppo_hard": PairLoss(paired.sppo_hard),
    "aot": PairLoss(paired.aot, coupled=True, weighable=False),
    "aot_unpaired": PairLoss(paired.aot_unpaired, coupled=True, weighable=False),
    "apo_zero": PairLoss(paired.apo_zero),
    "apo_down": PairLoss(paired.apo_down),
    "discopop": PairLoss(paired.discopop),
    "sigmoid_norm": PairLoss(paired.sigmoid_norm, normalised="mean"),
    "sft": PairLoss(paired.sft, reference=False, normalised="mean"),
    "orpo": PairLoss(reference_free.orpo, reference=False, normalised="mean"),
    "simpo": PairLoss(reference_free.simpo, reference=False, normalised="mean"),
    "alphapo": PairLoss(reference_free.alphapo, reference=False, normalised="mean"),
    "cpo": PairLoss(reference_free.cpo, reference=False),
    "cpo_hinge": PairLoss(reference_free.cpo_hinge, reference=False),
    "cpo_ipo": PairLoss(reference_free.cpo_ipo, reference=False, normalised="mean"),
}
"""Name in a recipe, as TRL's `loss_type` where TRL has the loss → what it is.

`bco_pair` is coupled through its reward shift alone, and is not where `delta` is given. A `sft`, `orpo` or
`cpo` whose `mean_tokens` is that of the global batch needs this number before the first forward, no more.
"""


@dataclass(frozen=True)
class PairLosses:
    """What `preference_losses` found; all tensors are (pairs,).

    losses: of the mixture, with gradient. terms: each loss by its name, before its weight, without
    gradient. chosen_rewards, rejected_rewards: implicit rewards, without gradient: β times the log-ratio,
    or for losses without a reference β times the log-probability as the first of them is normalised.
    """

    losses: Tensor
    terms: dict[str, Tensor]
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def preference_losses(
    pairs: Pairs,
    mixture: Mapping[str, float],
    *,
    weights: Tensor | None = None,
    **numbers: Any,
) -> PairLosses:
    """Losses of pairs: Σ weight · loss over a mixture of names (that of MPO, Wang et al. 2024,
    arXiv:2411.10442, is of sigmoid, bco_pair and sft).

    mixture: name of `LOSSES` → weight. weights: (pairs,) without gradient, times every loss (WPO,
    Zhou et al. 2024, arXiv:2406.11827, eq. 2; see `logprobs.answer_weights`). numbers: `beta` and what
    the losses take by keyword; each gets those it names. With a coupled loss `pairs` must be those of
    the whole global batch. Raises RecipeError as `mixture_problems` says, TypeError for a number that no loss
    has.
    """
    unknown = set(numbers) - {name for loss in LOSSES.values() for name in loss.numbers}
    if unknown:
        raise TypeError(f"no loss takes {', '.join(sorted(unknown))}")
    plain = numbers.get("score", reverse_kl) is reverse_kl
    problems = mixture_problems(mixture, plain_divergence=plain, weighted=weights is not None)
    if problems:
        raise RecipeError(problems)
    terms = {}
    for name in mixture:
        loss = LOSSES[name]
        taken = {key: value for key, value in numbers.items() if key in loss.numbers}
        found = loss.function(pairs, **taken)
        terms[name] = found if weights is None else weights.detach() * found
    mixed = [weight * terms[name] for name, weight in mixture.items()]
    total = sum(mixed[1:], mixed[0])
    chosen, rejected = implicit_rewards(pairs, mixture, beta=numbers.get("beta", 1.0))
    detached = {name: term.detach() for name, term in terms.items()}
    return PairLosses(total, detached, chosen, rejected)


def implicit_rewards(pairs: Pairs, mixture: Iterable[str], *, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards of the chosen and of the rejected answers (see `PairLosses`), (pairs,) each."""
    if pairs.ref_chosen is not None:
        found = pairs.ratios()
    else:
        means = LOSSES[next(iter(mixture))].normalised == "mean"
        found = pairs.means() if means else (pairs.chosen, pairs.rejected)
    return beta * found[0].detach(), beta * found[1].detach()


def mixture_problems(
    mixture: Iterable[str],
    *,
    label_smoothing: float | None = None,
    plain_divergence: bool = True,
    weighted: bool = False,
    place: str = "loss_type",
) -> list[Problem]:
    """What does not go together, to be said before a run: unknown names, divergences that mean nothing
    for a loss, weights for losses that sort, label_smoothing out of range (where it is given)."""
    names = list(mixture)
    if not names:
        return [Problem("names no loss", place=place, hint="give at least one, such as sigmoid")]
    found = []
    for name in names:
        loss = LOSSES.get(name)
        if loss is None:
            known = ", ".join(LOSSES)
            found.append(
                Problem(f"is '{name}', which is no loss", place=place, hint=f"use {known}")
            )
            continue
        if not plain_divergence and loss.reference and not loss.divergence:
            able = ", ".join(one for one, known in LOSSES.items() if known.divergence)
            message = (
                f"is '{name}', where a term of the prompt that a divergence leaves does not cancel"
            )
            found.append(
                Problem(message, place=place, hint=f"use reverse_kl, or a loss out of {able}")
            )
        if weighted and not loss.weighable:
            message = f"is '{name}', which sorts answers, so that a loss belongs to no one pair"
            found.append(Problem(message, place=place, hint="leave out the weights of pairs"))
        if label_smoothing is not None:
            problem = paired.smoothing_problem(name, label_smoothing)
            found += [problem] if problem else []
    return found
