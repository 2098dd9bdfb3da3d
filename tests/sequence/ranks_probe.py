"""Run by test_attention.py on two ranks: attention shared among them against plain attention, in float64.

ranks_probe.py OUT: writes, for each case, how far outputs and gradients lie apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from arctic_like.sequence import SequenceGroup, block_mask, borders_of, ulysses
from arctic_like.world import World

# heads, key heads, widths of keys and values, window
CASES: dict[str, tuple[int, int, int, int, int | None]] = {
    "plain": (4, 4, 8, 8, None),
    "grouped": (8, 2, 8, 8, None),
    "one key head": (4, 1, 8, 8, None),
    "three key heads": (6, 3, 8, 8, None),
    "wide values": (4, 2, 8, 12, None),
    "window": (4, 2, 8, 8, 5),
}
ROWS, LENGTH = 2, 24
POSITIONS = torch.tensor(
    [[*range(7), *range(17)], [*range(11), *range(3), *range(10)]]
)  # borders in the first and in the second half


def slowly(q: Any, k: Any, v: Any, window: int | None) -> Any:
    """Softmax over what a token may see, place by place."""
    groups = q.shape[1] // k.shape[1]
    found = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for row in range(ROWS):
        for place in range(LENGTH):
            first = place - int(POSITIONS[row, place])
            if window is not None:
                first = max(first, place - window + 1)
            for head in range(q.shape[1]):
                keys = k[row, head // groups, first : place + 1]
                weights = (keys @ q[row, head, place] / q.shape[-1] ** 0.5).softmax(0)
                found[row, head, place] = weights @ v[row, head // groups, first : place + 1]
    return found


def compare(group: SequenceGroup, case: tuple[int, int, int, int, int | None]) -> list[float]:
    heads, kept, width, values, window = case
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    whole = [draw(ROWS, heads, LENGTH, width), draw(ROWS, kept, LENGTH, width),
             draw(ROWS, kept, LENGTH, values)]  # fmt: skip
    wanted = draw(ROWS, heads, LENGTH, values)
    plain = [x.clone().requires_grad_() for x in whole]
    expected = slowly(plain[0], plain[1], plain[2], window)
    (expected * wanted).sum().backward()

    mask = block_mask(borders_of(POSITIONS), rows=ROWS, length=LENGTH, window=window)

    def attend(q: Any, k: Any, v: Any) -> Any:
        times = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(times, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    mine = [group.part(x, dim=2).clone().requires_grad_() for x in whole]
    found = ulysses(attend, mine[0], mine[1], mine[2], group=group)
    (found * group.part(wanted, dim=2)).sum().backward()
    apart = [float((found - group.part(expected, dim=2)).abs().max())]
    for part, true in zip(mine, plain, strict=True):
        assert part.grad is not None
        assert true.grad is not None
        apart.append(float((part.grad - group.part(true.grad, dim=2)).abs().max()))
    return apart


def compare_sums(group: SequenceGroup) -> list[float]:
    """A sum and a whole row: every rank back-propagates something else of its value."""
    x = torch.arange(12, dtype=torch.float64).view(2, 6) + 1
    plain, mine = x.clone().requires_grad_(), group.part(x).clone().requires_grad_()
    whole = group.whole(mine.square())
    (whole * (group.rank + 1)).sin().sum().backward()
    for rank in range(group.size):
        (plain.square() * (rank + 1)).sin().sum().backward()
    assert plain.grad is not None
    assert mine.grad is not None
    apart = [float((mine.grad - group.part(plain.grad)).abs().max())]
    plain, mine = x.clone().requires_grad_(), group.part(x).clone().requires_grad_()
    (group.sum(mine.exp().sum()) ** (group.rank + 1)).backward()
    for rank in range(group.size):
        (plain.exp().sum() ** (rank + 1)).backward()
    assert plain.grad is not None
    assert mine.grad is not None
    return [*apart, float((mine.grad / group.part(plain.grad) - 1).abs().max())]


def main() -> None:
    dist.init_process_group("gloo")
    world = World.from_environment()
    assert world.size == 2
    group = SequenceGroup.of(World(rank=world.rank, size=2, sequence_parallel_size=2))
    results = {name: compare(group, case) for name, case in CASES.items()}
    results["sums"] = compare_sums(group)
    everything: list[Any] = [None, None]
    dist.all_gather_object(everything, results)
    if world.is_main:
        merged = {name: [max(a) for a in zip(*(r[name] for r in everything), strict=True)]
                  for name in results}  # fmt: skip
        Path(sys.argv[-1]).write_text(json.dumps(merged))


main()
