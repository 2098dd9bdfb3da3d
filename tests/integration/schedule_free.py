"""A schedule-free optimizer for the tests, imported by the ranks by its dotted path."""

from __future__ import annotations

from typing import Any

import torch


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Defazio et al. 2024, "The Road Less Scheduled", equations 3 to 5.

    The parameters are y in training and x in evaluation; z is kept. The count stands in the groups.
    """

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "count": 0, "training": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["training"], "step() in the mode for evaluation"
            group["count"] += 1
            beta = group["beta"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                z = self.state[y].setdefault("z", y.detach().clone())
                x = (y - (1 - beta) * z) / beta
                z.sub_(y.grad, alpha=group["lr"])
                x += (z - x) / group["count"]
                y.copy_((1 - beta) * z + beta * x)

    def train(self) -> None:
        self._switch(to_training=True)

    def eval(self) -> None:
        self._switch(to_training=False)

    @torch.no_grad()
    def _switch(self, *, to_training: bool) -> None:
        for group in self.param_groups:
            if group["training"] == to_training:
                continue
            group["training"] = to_training
            beta = group["beta"]
            for p in group["params"]:
                if "z" in self.state[p]:
                    z = self.state[p]["z"]
                    p.copy_(
                        (1 - beta) * z + beta * p if to_training else (p - (1 - beta) * z) / beta
                    )
