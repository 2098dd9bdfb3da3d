"""A model whose rows may come and go, its data, and the same training in plain torch on one process.

Odd sizes, so that ZeRO's shares end inside parameters; a layer that the loss does not use; two groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arctic_like.engine.deepspeed import Engine
from arctic_like.engine.ds_config import deepspeed_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MICRO_BATCHES = 2
NEVER = (False,) * MICRO_BATCHES
CLIP = 0.05


class Points(nn.Module):
    """Weighs the colors of points by their distance to a query, then a small head."""

    def __init__(self, rows: int = 37) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(rows, 3))
        self.colors = nn.Parameter(torch.randn(rows, 2))
        self.sharpness = nn.Parameter(torch.rand(rows))
        self.head = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        self.spare = nn.Linear(3, 5)
        self.register_buffer("seen", torch.zeros(rows))

    def forward(self, queries: Tensor, *, spare: bool = False) -> Tensor:
        if spare:
            queries = queries + 0.1 * self.spare(queries)[:, :3]
        distance = (queries[:, None] - self.points[None]).square().sum(-1)
        mixed = torch.softmax(-distance * self.sharpness, dim=1) @ self.colors
        result: Tensor = self.head(torch.cat([queries, mixed], dim=1)).squeeze(1)
        return result


def model(dtype: str, seed: int = 0) -> Points:
    torch.manual_seed(seed)
    return Points().to(DTYPES[dtype])


def batch(step: int, rank: int, index: int, world: int, dtype: str) -> tuple[Tensor, Tensor]:
    """The rows of a micro-batch; how many depends on rank and index. Ranks share out what one rank
    of `world=1` has as more micro-batches."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + index)
    count = 3 + 2 * rank + 5 * index
    queries = torch.randn(count, 3, generator=generator)
    return queries.to(DTYPES[dtype]), queries.sum(1).sin()


def weight(world: int) -> int:
    return sum(3 + 2 * r + 5 * i for r in range(world) for i in range(MICRO_BATCHES))


def loss_of(module: Any, data: tuple[Tensor, Tensor], *, spare: bool = False) -> Tensor:
    """The sum over the rows."""
    loss: Tensor = (module(data[0], spare=spare).float() - data[1]).square().sum()
    return loss


def groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups; the group of the decayed comes second, so that an order by accident shows."""
    plain = [p for n, p in module.named_parameters() if "bias" in n or n == "sharpness"]
    decayed = [p for n, p in module.named_parameters() if not ("bias" in n or n == "sharpness")]
    return [
        {"params": plain, "lr": 2e-2, "weight_decay": 0.0},
        {"params": decayed, "lr": 1e-2, "weight_decay": 0.1},
    ]


def engine(
    stage: int,
    dtype: str,
    world: int,
    *,
    offload: bool = False,
    seed: int = 0,
    clip: float = CLIP,
    fused: bool = False,
    universal: bool = False,
    **zero: Any,
) -> Engine:
    """An engine around `model(dtype)`, with torch's AdamW.

    fused: DeepSpeed takes it for its FusedAdam, for which it has another wrapper at stage 0.
    universal: it will load a checkpoint of another number of ranks.
    """
    module = model(dtype, seed)
    section: dict[str, Any] = {"zero_optimization": {"stage": stage, **zero}}
    if offload:
        section["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config = deepspeed_config(
        section={"gradient_clipping": clip, **section}, dtype=dtype, micro_batch_size=4,
        gradient_accumulation_steps=MICRO_BATCHES, world_size=world, hidden_size=8, on_cpu=True,
    )  # fmt: skip
    config["checkpoint"] = {"load_universal": universal}
    optimizer = torch.optim.AdamW(groups(module))
    if fused:
        from deepspeed.ops.adam import FusedAdam

        optimizer.__class__ = type("FusedLike", (torch.optim.AdamW, FusedAdam), {})
    return Engine(module, optimizer=optimizer, config=config)


def backward(
    one: Engine, step: int, rank: int, world: int, dtype: str, spare: Sequence[bool] = NEVER
) -> None:
    """All micro-batches of a step; the gradient is the mean over all ranks' rows.

    spare: for each micro-batch, whether it uses the spare layer.
    """
    for index in range(MICRO_BATCHES):
        data = batch(step, rank, index, world, dtype)
        loss = loss_of(one, data, spare=spare[index]) * world / weight(world)
        one.backward(loss, last=index == MICRO_BATCHES - 1)


class Reference:
    """The same in plain torch: fp32 masters, the module in its dtype, no ZeRO, no ranks."""

    def __init__(self, dtype: str, world: int, *, clip: float = CLIP, seed: int = 0) -> None:
        self.dtype, self.world, self.clip = dtype, world, clip
        self.module = model(dtype, seed)
        self.masters = nn.ParameterDict(
            {n.replace(".", "/"): nn.Parameter(p.detach().float().clone())
             for n, p in self.module.named_parameters()}
        )  # fmt: skip
        named = {n.replace("/", "."): p for n, p in self.masters.items()}
        plain, decayed = (g["params"] for g in groups(self.module))
        own = {id(p): n for n, p in self.module.named_parameters()}
        made = groups(self.module)
        for group, parameters in zip(made, (plain, decayed), strict=True):
            group["params"] = [named[own[id(p)]] for p in parameters]
        self.optimizer = torch.optim.AdamW(made, foreach=False)
        self.named = named

    def gradients(self, step: int, spare: Sequence[bool] = NEVER) -> dict[str, Tensor]:
        """The mean over the global batch, summed in float64 over micro-batches of the model's dtype."""
        total = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.named.items()}
        for rank in range(self.world):
            for index in range(MICRO_BATCHES):
                self.module.zero_grad()
                data = batch(step, rank, index, self.world, self.dtype)
                loss = loss_of(self.module, data, spare=spare[index])
                (loss * self.world / weight(self.world)).backward()
                for name, parameter in self.module.named_parameters():
                    if parameter.grad is not None:
                        total[name] += parameter.grad.double() / self.world
        return {name: value.float() for name, value in total.items()}

    def update(self, gradients: dict[str, Tensor]) -> float:
        """Clip and step; returns the norm before clipping."""
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        factor = min(1.0, self.clip / (float(norm) + 1e-6)) if self.clip else 1.0
        for name, parameter in self.named.items():
            parameter.grad = gradients[name] * factor
        self.optimizer.step()
        self.lower()
        return float(norm)

    def lower(self) -> None:
        """The module's weights are the masters', rounded."""
        for name, parameter in self.module.named_parameters():
            parameter.data = self.named[name].detach().to(parameter.dtype)

    def resize(self, name: str, keep: Tensor, new: Tensor | None, **moments: Tensor) -> None:
        """The surgery by hand."""
        parameter = self.named[name]
        state = self.optimizer.state[parameter]
        rows = 0 if new is None else len(new)

        def change(old: Tensor, more: Tensor | None) -> Tensor:
            kept = old[keep]
            if not rows:
                return kept
            return torch.cat([kept, torch.zeros(rows, *old.shape[1:]) if more is None else more])

        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key] = change(state[key], moments.get(key))
        parameter.grad = None
        parameter.data = change(parameter.detach(), new)
        self.lower()


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative L2 distance of any tensor; infinite where names or shapes differ."""
    if found.keys() != expected.keys():
        return float("inf")
    worst = 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return float("inf")
        distance = (found[name].double() - value.double()).norm()
        worst = max(worst, float((distance / value.double().norm().clamp(min=1e-3)).detach()))
    return worst


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
