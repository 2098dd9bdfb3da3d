"""Loss functions over tensors: no model, no config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def next_token_loss(logits: Tensor, labels: Tensor, *, ignore: int = IGNORE) -> Tensor:
    """Mean cross-entropy of predicting `labels[:, i + 1]` from `logits[:, i]`, in float32.

    logits: (batch, length, vocabulary), any float dtype; labels: (batch, length) int64.
    The mean is over trained labels; over none of them it is 0 with zero gradient, not NaN.
    """
    import torch.nn.functional as F

    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=ignore, reduction="sum"
    )
    return total / (targets != ignore).sum().clamp(min=1)
