"""Rows as several ranks share them: padded to whole parts, with the borders of their documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
_FILLS = {"input_ids": 0, "labels": IGNORED}


def padded(batch: Mapping[str, Tensor], multiple: int) -> dict[str, Tensor]:
    """The batch with rows as long as the next multiple. What is added is a document of its own, as a
    collate adds it; its tokens are 0.

    batch: on the host; tensors of the shape of `input_ids` (rows, length) are rows, others stay.
    """
    import torch
    import torch.nn.functional as F

    rows, length = batch["input_ids"].shape
    missing = -length % multiple
    if not missing:
        return dict(batch)
    found = dict(batch)
    for name, values in batch.items():
        if not torch.is_tensor(values) or values.shape != (rows, length):
            continue
        if name == "position_ids":
            more = torch.arange(missing, dtype=values.dtype).expand(rows, missing)
            found[name] = torch.cat([values, more], dim=1)
        else:
            found[name] = F.pad(values, (0, missing), value=_FILLS.get(name, -1))
    return found


def borders_of(position_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """Where the documents of a batch begin, its rows laid end to end, and the end: (documents + 1,) int32,
    what variable-length attention calls cumulative sequence lengths.

    position_ids: (rows, length), on the host: any other device is waited for. A document begins with a
    row and wherever a position is not the one before plus one. labels: (rows, length). With them, what
    follows a row's last trained place belongs to the document before it, however many documents that are:
    attention is causal, so nothing trained changes, and a padded row is one document.
    """
    import torch
    import torch.nn.functional as F

    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if labels is not None:
        trained = labels != IGNORED
        # how many trained places stand here or behind
        begins[:, 1:] &= trained.flip(1).cumsum(1).flip(1)[:, 1:] > 0
    places = begins.flatten().nonzero().flatten()
    return F.pad(places, (0, 1), value=position_ids.numel()).to(torch.int32)


def block_mask(
    borders: Tensor, *, rows: int, length: int, window: int | None = None
) -> Tensor | None:
    """Who sees whom: (rows, 1, length, length) bool, True where the query (third) sees the key (fourth):
    in the same document, not later, and less than `window` places before.

    borders: of `borders_of`, on any device. None where a row is one document and no window is shorter:
    plain causal attention, for which kernels want no mask.
    """
    import torch

    reach = length if window is None else min(window, length)
    if borders.numel() == rows + 1 and reach == length:
        return None
    device = borders.device
    places = torch.arange(rows * length, device=device, dtype=borders.dtype)
    documents = torch.searchsorted(borders[1:], places, right=True).view(rows, 1, length)
    place = torch.arange(length, device=device)
    seen = place[:, None] >= place
    if reach < length:
        seen &= place[:, None] - place < reach
    return (documents[..., :, None] == documents[..., None, :]) & seen
