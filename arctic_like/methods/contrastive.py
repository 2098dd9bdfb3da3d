"""Contrastive losses of embeddings, and measures of retrieval. Pure functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ABSENT = -1
"""The key of a candidate that is not there; keys of texts are at least 0."""


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    *,
    inverse_temperature: Tensor | float,
    left_out: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """The loss of every anchor, (anchors,): van den Oord et al. 2018 (arXiv:1807.03748), eq. 4, with cosine
    similarity over a temperature. With normalised embeddings and in-batch negatives it is the loss of Chen
    et al. 2020 and, symmetric, of CLIP (Radford et al. 2021, figure 3).

    anchors: (n, dim). candidates: (n + m, dim), the first n the anchors' positives in their order.
    left_out: (n, n + m) bool, candidates that are no negatives of an anchor. symmetric: the mean with the
    loss of finding each positive's anchor among all of them.
    """
    import torch
    import torch.nn.functional as F

    scores = anchors @ candidates.T * inverse_temperature
    if left_out is not None:
        scores = scores.masked_fill(left_out, -torch.inf)
    own = torch.arange(len(anchors), device=anchors.device)
    losses = F.cross_entropy(scores, own, reduction="none")
    if not symmetric:
        return losses
    back = scores[:, : len(anchors)].T
    return (losses + F.cross_entropy(back, own, reduction="none")) / 2


def equal_texts(anchor_keys: Tensor, candidate_keys: Tensor) -> Tensor:
    """(n, n + m) bool: candidates that are no negatives of an anchor, being absent or equal to its own
    positive or to that of an equal anchor. Its own positive, candidate i of anchor i, is not among them.

    anchor_keys: (n,) int64, candidate_keys: (n + m,) int64; equal keys, equal texts.
    """
    import torch

    count = len(anchor_keys)
    positives = candidate_keys[:count]
    kinds, group = torch.unique(anchor_keys, return_inverse=True)
    same = (positives[:, None] == candidate_keys[None, :]).to(torch.int32)
    known = same.new_zeros(len(kinds), len(candidate_keys)).index_add(0, group, same)
    out = (known[group] > 0) | (candidate_keys == ABSENT)[None, :]
    own = torch.arange(count, device=out.device)
    out[own, own] = False
    return out


def matryoshka(embeddings: Tensor, dim: int) -> Tensor:
    """The first `dim` values of each embedding, (…, dim), of length 1 again: Kusupati et al. 2022
    (arXiv:2205.13147), section 3."""
    import torch.nn.functional as F

    return F.normalize(embeddings[..., :dim], dim=-1)


def retrieval(scores: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """nDCG@10, MRR@10, recall@1 and recall@10 of every query, each (queries,) float64.

    scores: (queries, candidates), higher is better; candidates of one score keep their order. relevant: the
    same shape, bool, at least one a query. Gains are 0 or 1: Järvelin and Kekäläinen 2002, with discount
    1 / log2(rank + 1). recall: found relevant candidates over all of a query's.
    """
    import torch

    order = scores.argsort(dim=1, descending=True, stable=True)[:, :10]
    hits = relevant.gather(1, order).double()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device, dtype=torch.float64)
    discounts = 1 / torch.log2(ranks + 1)
    totals = relevant.sum(1)
    ideal = (ranks[None, :] <= totals[:, None]).double() @ discounts
    return {
        "ndcg@10": hits @ discounts / ideal,
        "mrr@10": (hits / ranks).amax(1),
        "recall@1": hits[:, 0] / totals,
        "recall@10": hits.sum(1) / totals,
    }


def retrieval_means(
    anchors: Tensor,
    candidates: Tensor,
    anchor_keys: Tensor,
    candidate_keys: Tensor,
    *,
    chunk: int = 1024,
) -> dict[str, float]:
    """The means of `retrieval` over all anchors, among all candidates, each text once.

    As `info_nce` and `equal_texts` have them. Relevant for an anchor are its positive and those of equal
    anchors.
    """
    import torch

    there = candidate_keys != ABSENT
    keys, place = torch.unique(candidate_keys[there], return_inverse=True)
    # of equal texts, which have one embedding, any; the last one written is as good
    rows = torch.empty(len(keys), dtype=torch.long, device=place.device)
    rows[place] = torch.arange(len(place), device=place.device)
    texts = candidates[there][rows]
    kinds, group = torch.unique(anchor_keys, return_inverse=True)
    wanted = torch.zeros(len(kinds), len(keys), dtype=torch.bool, device=place.device)
    # positives are the first candidates, and are always there
    wanted[group, place[: len(anchor_keys)]] = True
    sums: dict[str, float] = {}
    for start in range(0, len(anchors), chunk):
        here = slice(start, start + chunk)
        found = retrieval(anchors[here] @ texts.T, wanted[group[here]])
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    return {name: total / len(anchors) for name, total in sums.items()}


def weighted(losses: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """Σ weight · loss over Matryoshka dimensions, (rows,)."""
    import torch

    return torch.stack([losses[dim] * weights[dim] for dim in losses]).sum(0)
