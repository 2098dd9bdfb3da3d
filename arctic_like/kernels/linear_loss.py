"""Losses of a linear head over a vocabulary, whose logits never exist all at once.

A batch's logits are tokens · vocabulary numbers: for 4 rows of 1,024 tokens and 32,000 words 0.5 GB, held
several times over by a plain cross-entropy. Here tokens that are not trained are dropped before
the head, and the others pass through it tile by tile. Losses and gradients are those of the plain
computation, to rounding. Nothing here knows a model; `model/heads.py` finds the head of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_like.kernels.passes import each, rows_for, summed
from arctic_like.kernels.tile_losses import CrossEntropy, Distance, Divergence, Mixture
from arctic_like.kernels.tiles import Head, detached

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Summed:
    """A sum over trained tokens, and what it is the sum of.

    total: scalar with gradient. losses: (tokens,) without gradient, 0 where not trained.
    """

    total: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Distilled:
    """Sums over trained tokens: `total` with gradient; its two parts, unweighted, without."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def next_tokens(labels: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """The targets of a batch's hidden states, (rows · length,): each place's is the label of the next one,
    the last of a row has none. labels: (rows, length) int64."""
    import torch.nn.functional as F

    return F.pad(labels[:, 1:], (0, 1), value=ignore).flatten()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    softcap: float | None = None, scale: float = 1.0, low: Tensor | None = None,
    ignore: int = IGNORE, places: Tensor | None = None, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """-log p(target) of every token, (tokens,), 0 where the target is `ignore`; differentiable, also
    with another weight for every token. For a sum or a mean take `linear_cross_entropy_sum`.

    hidden: (tokens, hidden); weight: (vocabulary, hidden); bias: (vocabulary,); all of one dtype. low: of an
    adapter of the head, whose part of the hidden states is in their last columns (`tiles.Head`).
    targets: (tokens,) int64. float32 is returned, float64 for float64. places: where targets are
    trained, (n,) int64; finding them makes a GPU's host wait. tile: tokens at a time, else what a
    budget of memory allows.
    Raises ValueError where shapes or dtypes do not fit.
    """
    head = _checked(hidden, Head(weight, bias, scale, softcap, low))
    kept, places = _trained(hidden, targets, ignore, places)
    losses = each(
        kept, head, CrossEntropy(targets.index_select(0, places)), tile=rows_for(head, tile=tile)
    )
    return losses.new_zeros(targets.shape).index_copy(0, places, losses)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    softcap: float | None = None, scale: float = 1.0, low: Tensor | None = None,
    ignore: int = IGNORE, places: Tensor | None = None, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """log p(target) of every token, (tokens,), 0 where the target is `ignore`; differentiable.

    What preference methods sum over an answer. Arguments: `linear_cross_entropy`.
    """
    return -linear_cross_entropy(
        hidden, weight, targets, bias=bias, softcap=softcap, scale=scale, low=low, ignore=ignore,
        places=places, tile=tile,
    )  # fmt: skip


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    softcap: float | None = None, scale: float = 1.0, low: Tensor | None = None,
    ignore: int = IGNORE, places: Tensor | None = None, tile: int | None = None,
) -> Summed:  # fmt: skip
    """The sum of -log p(target) over trained tokens; its gradient is computed here and now, and scaled in
    the backward, so that nothing is computed twice. A mean is `total / count`.

    Without gradient (evaluation) none is computed; nor is that of what does not require one. With
    no trained token the sum is 0 and its gradient zeros. Arguments: `linear_cross_entropy`.
    """
    head = _checked(hidden, Head(weight, bias, scale, softcap, low))
    kept, places = _trained(hidden, targets, ignore, places)
    total, values = summed(
        kept, head, CrossEntropy(targets.index_select(0, places)), tile=rows_for(head, tile=tile)
    )
    return Summed(total, values.new_zeros(targets.shape).index_copy(0, places, values[0]))


def linear_kl(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, *,
    kind: Divergence = "forward", temperature: float = 1.0, beta: float = 0.5,
    trained: Tensor | None = None, places: Tensor | None = None, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """How far the student's distribution is from the teacher's at every token, (tokens,), 0 where it is
    not `trained`; the gradient goes to the student alone.

    hidden, teacher_hidden: (tokens, ·), each in its head's dtype; the vocabularies are one. kind,
    temperature, beta: `tile_losses.Distance`; not multiplied by temperature². trained: (tokens,)
    bool, None for all; or `places` as in `linear_cross_entropy`. Raises ValueError.
    """
    student, teacher = _pair(hidden, head, teacher_hidden, teacher, kind, temperature, beta)
    kept, places = _places(hidden, trained, places)
    tile = rows_for(student, loss_buffers=Distance.buffers, tile=tile)
    loss = Distance(
        teacher_hidden.detach().index_select(0, places), teacher, rows=min(tile, len(kept)),
        kind=kind, temperature=temperature, beta=beta,
    )  # fmt: skip
    found = each(kept, student, loss, tile=tile)
    return found.new_zeros(len(hidden)).index_copy(0, places, found)


def linear_distillation(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, targets: Tensor, *,
    share: float, kind: Divergence = "forward", temperature: float = 1.0, beta: float = 0.5,
    ignore: int = IGNORE, places: Tensor | None = None, tile: int | None = None,
) -> Distilled:  # fmt: skip
    """Σ (1 - share) · cross-entropy + share · temperature² · divergence over trained tokens (Hinton, Vinyals
    and Dean 2015, section 2), from one pass over the student's logits; its gradient is computed here.

    Arguments: `linear_cross_entropy` and `linear_kl`.
    """
    student, teacher = _pair(hidden, head, teacher_hidden, teacher, kind, temperature, beta)
    kept, places = _trained(hidden, targets, ignore, places)
    tile = rows_for(student, loss_buffers=Distance.buffers + 2, tile=tile)
    distance = Distance(
        teacher_hidden.detach().index_select(0, places), teacher, rows=min(tile, len(kept)),
        kind=kind, temperature=temperature, beta=beta,
    )  # fmt: skip
    labels = CrossEntropy(targets.index_select(0, places))
    loss = Mixture((1 - share, labels), (share * temperature**2, distance))
    total, values = summed(kept, student, loss, tile=tile)
    return Distilled(total, cross_entropy=values[1].sum(), divergence=values[2].sum())


def _checked(hidden: Tensor, head: Head) -> Head:
    """The head. Raises ValueError where it and the hidden states do not fit."""
    weight, bias, low = head.weight, head.bias, head.low
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != head.width:
        rank = "" if low is None else f" and an adapter's {tuple(low.shape)}"
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} and a weight {tuple(weight.shape)}{rank} do not fit; "
            "expected are (tokens, hidden) and (vocabulary, hidden)"
        )
    for name, of_logits in (("a bias", bias), ("an adapter", low)):
        if of_logits is not None and of_logits.shape[:1] != weight.shape[:1]:
            shape = tuple(of_logits.shape)
            raise ValueError(f"{name} {shape} of {head.vocabulary} logits does not fit")
    dtypes = {_name(x) for x in (hidden, weight, bias, low) if x is not None}
    if len(dtypes) > 1:
        raise ValueError(f"hidden states and head have the dtypes {' and '.join(sorted(dtypes))}")
    if head.softcap is not None and head.softcap <= 0:
        raise ValueError(f"a softcap of {head.softcap} is not positive; None is no cap")
    return head


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pair(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher: Head, kind: str,
    temperature: float, beta: float,
) -> tuple[Head, Head]:  # fmt: skip
    """The two heads, the teacher's without gradient. Raises ValueError for what cannot be compared."""
    _checked(hidden, head)
    _checked(teacher_hidden, teacher)
    if head.vocabulary != teacher.vocabulary:
        raise ValueError(
            f"the student has {head.vocabulary} logits, the teacher {teacher.vocabulary}: "
            "their distributions cannot be compared"
        )
    if len(hidden) != len(teacher_hidden):
        raise ValueError(
            f"{len(hidden)} tokens of the student, {len(teacher_hidden)} of the teacher"
        )
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"{kind!r} is no divergence; there are forward, reverse and jsd")
    if temperature <= 0:
        raise ValueError(f"a temperature of {temperature} is not positive")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta is {beta}; between 0 and 1 is jsd, at 0 the forward and at 1 the reverse divergence"
        )
    return head, detached(teacher)


def _trained(
    hidden: Tensor, targets: Tensor, ignore: int, places: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(hidden states of trained tokens, their places). Raises ValueError where targets do not fit."""
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"{tuple(targets.shape)} targets of {len(hidden)} hidden states")
    return _places(hidden, targets != ignore if places is None else None, places)


def _places(hidden: Tensor, trained: Tensor | None, places: Tensor | None) -> tuple[Tensor, Tensor]:
    import torch

    if places is None:
        if trained is None:
            return hidden, torch.arange(len(hidden), device=hidden.device)
        places = trained.nonzero().squeeze(1)
    return hidden.index_select(0, places), places
