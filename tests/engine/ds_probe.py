"""What `test_ds_config` runs on every rank: one SGD step per job, compared with plain torch.

With learning rate 1 and no clipping, the change of the fp32 master weights is the gradient.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

from arctic_like.engine.ds_config import deepspeed_config

MICRO_BATCHES, WIDTH = 8, 32
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(64, 1)).to(dtype)


def batch(rank: int, index: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + index)
    return torch.randn(4, WIDTH, generator=generator).to(dtype)


def loss_of(module: Any, data: torch.Tensor) -> torch.Tensor:
    return module(data).float().square().mean() / MICRO_BATCHES


def reference(world: int, dtype: torch.dtype) -> list[torch.Tensor]:
    module = model(dtype)
    total = [torch.zeros_like(p, dtype=torch.float64) for p in module.parameters()]
    for rank in range(world):
        for index in range(MICRO_BATCHES):
            module.zero_grad()
            loss_of(module, batch(rank, index, dtype)).backward()
            for sum_, parameter in zip(total, module.parameters(), strict=True):
                assert parameter.grad is not None
                sum_.add_(parameter.grad.double() / world)
    return total


def master_weights(engine: Any) -> list[torch.Tensor]:
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # DeepSpeed's half-precision optimizers at stage 0
        return [p.detach().double() for group in optimizer.fp32_groups for p in group]
    if engine.zero_optimization_stage() == 0:
        return [p.detach().double() for p in engine.module.parameters()]
    return [safe_get_full_fp32_param(p).double() for p in engine.module.parameters()]


def run(job: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    dtype = DTYPES[job["dtype"]]
    module = model(dtype)
    before = [p.detach().clone().double() for p in module.parameters()]
    config = deepspeed_config(
        section={"gradient_clipping": 0.0, **job["section"]},
        dtype=job["dtype"],
        micro_batch_size=4,
        gradient_accumulation_steps=MICRO_BATCHES,
        world_size=world,
        hidden_size=WIDTH,
        on_cpu=True,
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    for index in range(MICRO_BATCHES):
        engine.set_gradient_accumulation_boundary(index == MICRO_BATCHES - 1)
        engine.backward(loss_of(engine, batch(rank, index, dtype)), scale_wrt_gas=False)
        engine.step()
    error = size = 0.0
    after = master_weights(engine)
    for old, new, gradient in zip(before, after, reference(world, dtype), strict=True):
        error += float(((old - new.view_as(old)) - gradient).square().sum())
        size += float(gradient.square().sum())
    read = {
        "gradient_clipping": engine.gradient_clipping(),
        "steps_per_print": engine.steps_per_print(),
        "zero_stage": int(engine.zero_optimization_stage()),
    }
    engine.destroy()
    return {"gradient_error": (error / size) ** 0.5, "read": read}


def main() -> None:
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    records = [run(job, rank, world) for job in json.loads(os.environ["PROBE"])]
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(records))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
