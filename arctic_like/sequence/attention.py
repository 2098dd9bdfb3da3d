"""Attention over whole rows that several ranks share: parts of rows for heads, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.sequence.group import SequenceGroup


def ulysses(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    group: SequenceGroup,
) -> Tensor:
    """Attention over rows of which every rank of the group has a part: (rows, heads, part, value width).

    query: (rows, heads, part, width); key, value: (rows, key heads, part, ·), in the order of the rows;
    positional embeddings are in them already. `part` is the same on all ranks.
    attend: from query (rows, heads / size, length, width) and the key and value heads that belong to
    them, (rows, n, length, ·), to (rows, heads / size, length, value width). length = part · size; n
    divides heads / size, query head i has key head i // (heads / size / n). It applies the masks: causal,
    document borders (`block_mask`), windows.
    Key heads that `size` does not divide are repeated. Two exchanges; the gradients are exact.
    Raises ValueError where `size` does not divide the heads.
    """
    size, heads, kept = group.size, query.shape[1], key.shape[1]
    if heads % size:
        raise ValueError(f"{heads} attention heads cannot be shared among {size} ranks")
    if heads % kept:
        raise ValueError(f"{heads} query heads do not share {kept} key heads evenly")
    if size == 1:
        return attend(query, key, value)
    times = math.lcm(kept, size) // kept
    if times > 1:
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    return _to_parts(attend(*_to_heads([query, key, value], group)), group)


def _to_heads(parts: Sequence[Tensor], group: SequenceGroup) -> list[Tensor]:
    """Each (rows, heads, part, width) → (rows, heads / size, part · size, width), in one exchange."""
    import torch

    size = group.size
    # (size, rows, heads / size, part, width): what goes to each rank
    sent = [torch.unflatten(x, 1, (size, -1)).movedim(1, 0) for x in parts]
    flat = [x.flatten(1) for x in sent]
    together = group.exchange(torch.cat(flat, dim=1))
    received = torch.split(together, [x.shape[1] for x in flat], dim=1)
    # from each rank its part of the row: rank before place
    return [
        x.view(to.shape).movedim(0, 2).flatten(2, 3) for x, to in zip(received, sent, strict=True)
    ]


def _to_parts(heads: Tensor, group: SequenceGroup) -> Tensor:
    """(rows, heads / size, length, width) → (rows, heads, length / size, width)."""
    import torch

    sent = torch.unflatten(heads, 2, (group.size, -1)).movedim(2, 0)
    return group.exchange(sent).movedim(0, 1).flatten(1, 2)
