"""Loss functions over tensors: no model, no config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100


def trained_labels(labels: Tensor, *, ignore: int = IGNORE) -> int:
    """How many labels are trained in a batch: those after the shift that are not `ignore`.

    labels: (batch, length) int64 on the CPU. The first place of a row predicts nothing and
    never counts; a packed document's first label is `ignore` by the data's contract.
    """
    # numpy: a fifth of torch's time for so small an array, and it is asked of every micro-batch.
    return int(np.count_nonzero(labels.numpy()[:, 1:] != ignore))


def rows_of(batch: Any) -> int:
    """Rows of a batch of nested tensors: the first dimension of the first tensor in it; 1 of a scalar."""
    import torch

    pending = [batch]
    while pending:
        found = pending.pop(0)
        if torch.is_tensor(found):
            return len(found) if found.ndim else 1
        if isinstance(found, Mapping):
            found = found.values()
        pending[:0] = found if isinstance(found, Iterable) and not isinstance(found, str) else ()
    raise RunError(
        f"weight(batch) is not known for a batch without a tensor ({type(batch).__name__}); "
        "write weight(self, batch): what the loss is the mean over"
    )


def token_losses(logits: Tensor, labels: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """Cross-entropy of predicting `labels[:, i + 1]` from `logits[:, i]`; 0 where it is not trained.

    logits: (batch, length, vocabulary), any float dtype; labels: (batch, length) int64. Returns
    (batch, length - 1) float32.
    """
    return target_losses(logits[:, :-1], labels[:, 1:], ignore=ignore)


def target_losses(logits: Tensor, targets: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """Cross-entropy of predicting `targets[:, i]` from `logits[:, i]`; 0 where it is not trained.

    logits: (batch, length, vocabulary), any float dtype; targets: (batch, length) int64. Returns
    (batch, length) float32.
    """
    import torch.nn.functional as F

    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=ignore, reduction="none"
    )
    return losses.view(targets.shape)


def mean_loss(losses: Tensor, labels: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """The mean of `token_losses` over trained labels; over none of them 0 with zero gradient, not
    NaN."""
    return losses.sum() / (labels[:, 1:] != ignore).sum().clamp(min=1)


def next_token_loss(logits: Tensor, labels: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """Mean cross-entropy of the next token over trained labels (`token_losses`, `mean_loss`)."""
    return mean_loss(token_losses(logits, labels, ignore=ignore), labels, ignore=ignore)


def source_losses(
    losses: Tensor, labels: Tensor, source_ids: Tensor, sources: Sequence[str], *,
    ignore: int = IGNORE,
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """Source → (sum of its tokens' losses, how many are trained), float64 scalars without gradient.

    losses: of `token_losses`. labels, source_ids: (batch, length) int64; a label's source is that of
    its own token. Every source is in it, so that all ranks have the same names. No synchronisation.
    """
    import torch

    trained = labels[:, 1:] != ignore
    # what is not trained, padding with its -1 too, goes into a bin of its own
    bins = torch.where(trained, source_ids[:, 1:], len(sources)).flatten()
    empty = torch.zeros(len(sources) + 1, dtype=torch.float64, device=losses.device)
    sums = empty.index_add(0, bins, losses.detach().double().flatten())
    counts = empty.index_add(0, bins, trained.double().flatten())
    return {name: (sums[number], counts[number]) for number, name in enumerate(sources)}
