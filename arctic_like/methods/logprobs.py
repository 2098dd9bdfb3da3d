"""Log-probabilities of answers from logits, in packed and padded rows.

Documents are counted through the batch: row by row, in each row as `segment_ids` has them. With pairs
document 2k is the chosen and 2k + 1 the rejected answer of the batch's k-th pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arctic_like.errors import RunError
from arctic_like.methods.pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Answers:
    """logprobs: (documents,) float64, log π(y|x) summed over trained tokens. tokens: (documents,)
    int64, how many those are."""

    logprobs: Tensor
    tokens: Tensor


def answer_logprobs(
    logits: Tensor, labels: Tensor, segment_ids: Tensor, *, documents: int | None = None
) -> Answers:
    """Log-probabilities of all documents of a batch.

    logits: (batch, length, vocabulary), any float dtype; labels: (batch, length) int64, -100 where not
    trained, as is each document's first; segment_ids: (batch, length) int64, the document's number in its
    row, counted from 0, and -1 in padding. documents: how many the batch has (`count_documents`,
    best asked of the batch on the CPU); None counts them, for which the host waits for the device.
    """
    return answer_sums(token_logprobs(logits, labels), labels, segment_ids, documents=documents)


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log π(labels[:, i + 1]) by `logits[:, i]`, (batch, length - 1) in at least float32; 0 where it
    is not trained."""
    return target_logprobs(logits[:, :-1], labels[:, 1:])


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log π(targets[:, i]) by `logits[:, i]`, (batch, length) in at least float32; 0 where it is not
    trained."""
    import torch
    import torch.nn.functional as F

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -losses.view(targets.shape)


def answer_sums(
    logprobs: Tensor,
    labels: Tensor,
    segment_ids: Tensor,
    *,
    documents: int | None = None,
    ld_alpha: float | None = None,
) -> Answers:
    """As `answer_logprobs`, from log-probabilities of tokens.

    logprobs: (batch, length - 1), of `labels[:, 1:]`; what is not trained is not looked at. Sums are
    float64: those of a thousand tokens lose in float32 what tells a model from its reference.

    ld_alpha: α of LD-DPO, Liu et al. 2024 (arXiv:2409.06411): the tokens of a pair's longer answer that lie
    beyond the length of the shorter count α times. Documents must be pairs then. `tokens` stays.
    """
    import torch

    trained = labels[:, 1:] != IGNORE
    index, documents = _documents(segment_ids, documents)
    places = torch.where(trained, index[:, 1:], documents).flatten()
    tokens = _summed(trained.flatten().long(), places, documents)
    values = torch.where(trained, logprobs, 0.0).double().flatten()
    if ld_alpha is not None:
        values = values * _desensitised(trained.flatten(), places, tokens, ld_alpha)
    return Answers(_summed(values, places, documents), tokens)


def _desensitised(trained: Tensor, places: Tensor, tokens: Tensor, alpha: float) -> Tensor:
    """1 for the tokens within the shorter answer's length, α beyond it; (tokens of the batch,) float64.
    Documents lie in order, so the trained tokens before a document are those of all before it."""
    import torch

    _check_pairs(len(tokens))
    shared = tokens.view(-1, 2).amin(1).repeat_interleave(2)
    # where a document's shared part ends, in trained tokens since the batch began; the bin of what is
    # not trained last
    ends = torch.cat([tokens.cumsum(0) - tokens + shared, tokens.new_zeros(1)])
    beyond = trained.long().cumsum(0) > ends[places]
    weights = torch.ones(len(places), dtype=torch.float64, device=places.device)
    return weights.masked_fill(beyond, alpha)


def log_sum_squares(logits: Tensor) -> Tensor:
    """log Σ_v π(v)² of the distributions that predict tokens 1 …, (batch, length - 1) in at least
    float32, without gradient: how concentrated they are."""
    return concentration(logits[:, :-1])


def concentration(logits: Tensor) -> Tensor:
    """log Σ_v π(v)² of every distribution, (batch, length) in at least float32, without gradient."""
    import torch

    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    return (2 * wide).logsumexp(-1) - 2 * wide.logsumexp(-1)


def answer_weights(
    logprobs: Tensor,
    concentration: Tensor,
    labels: Tensor,
    segment_ids: Tensor,
    *,
    documents: int | None = None,
) -> Tensor:
    """WPO's weights of answers, (documents,) float64 without gradient: how likely each is under the
    policy itself, Zhou et al. 2024 (arXiv:2406.11827), eq. 2 with sampled alignment:
    exp(mean over tokens of (log π(y_t) - log Σ_v π(v)²)). A pair's weight is the product of its two.

    logprobs: of `token_logprobs`; concentration: of `log_sum_squares`; both (batch, length - 1).
    """
    found = answer_sums(logprobs.detach() - concentration, labels, segment_ids, documents=documents)
    return (found.logprobs / found.tokens.clamp(min=1)).exp()


def pair_weights(weights: Tensor) -> Tensor:
    """Weights of pairs (pairs,) from those of their answers (2 · pairs,)."""
    _check_pairs(len(weights))
    return weights[0::2] * weights[1::2]


def pairs_of(policy: Answers, reference: Answers | None = None) -> Pairs:
    """The documents of a batch as pairs. Raises RunError for an odd number of them."""
    _check_pairs(len(policy.logprobs))
    ref = None if reference is None else reference.logprobs.detach()
    return Pairs(
        chosen=policy.logprobs[0::2],
        rejected=policy.logprobs[1::2],
        ref_chosen=None if ref is None else ref[0::2],
        ref_rejected=None if ref is None else ref[1::2],
        chosen_tokens=policy.tokens[0::2],
        rejected_tokens=policy.tokens[1::2],
    )


def count_documents(segment_ids: Tensor) -> int:
    """How many documents a batch has."""
    return int((segment_ids.amax(1) + 1).sum())


def document_values(values: Tensor, segment_ids: Tensor, *, documents: int | None = None) -> Tensor:
    """What every token of a document says alike, such as `desirable`: (batch, length) → (documents,)
    of the same integer dtype. A document has at least one token."""
    index, documents = _documents(segment_ids, documents)
    found = values.new_zeros(documents + 1)
    return found.scatter(0, index.flatten(), values.flatten())[:documents]


def _documents(segment_ids: Tensor, documents: int | None) -> tuple[Tensor, int]:
    """(the number within the batch of each token's document, (batch, length), that of padding being the
    number of documents; that number)."""
    import torch

    counts = segment_ids.amax(1) + 1
    if documents is None:
        documents = int(counts.sum())
    before = (counts.cumsum(0) - counts)[:, None]
    return torch.where(segment_ids >= 0, segment_ids + before, documents), documents


def _summed(values: Tensor, places: Tensor, documents: int) -> Tensor:
    """Sums by place, (documents,); what has the place `documents` is left out."""
    return values.new_zeros(documents + 1).index_add(0, places, values)[:documents]


def _check_pairs(documents: int) -> None:
    if documents % 2:
        raise RunError(
            f"the batch has {documents} documents, which are not pairs; "
            "rows hold a chosen and a rejected answer each time (data.type: dpo)"
        )
