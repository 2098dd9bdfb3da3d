"""Run by `deepspeed --num_gpus 2`: what test_two_ranks compares with one rank.

two_ranks.py PRETRAINED OUT: writes initial weights of stages 0 and 3, and exports, into OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import save_file

from arctic_like.checkpoint.huggingface import export
from arctic_like.engine.host import HostGroup
from arctic_like.engine.weights import iterate_weights
from arctic_like.errors import ArcticError, RecipeError
from arctic_like.model.isolation import check_isolation
from arctic_like.optimizer.adam import AdamWConfig, AdamWFactory
from arctic_like.world import World
from tests.model.shapes import GPT2, MAMBA, MIXTRAL, TIED, byte_tokenizer, make

CASES = {
    "llama": (TIED, "fp32"),
    "gpt2": (GPT2, "bf16"),
    "mixtral": (MIXTRAL, "fp32"),
    "mamba": (MAMBA, "bf16"),
}


def write(model: Any, path: Path, world: World) -> None:
    weights = {name: tensor for name, tensor in iterate_weights(model) if tensor is not None}
    buffers = {f"buffer:{name}": buffer.contiguous() for name, buffer in model.named_buffers()}
    if world.is_main:
        save_file({**weights, **buffers}, path)
    else:
        assert not weights


def groups(model: Any) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = AdamWFactory(AdamWConfig()).build(model=model, device="cpu", offload=False)
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def proves(model: Any) -> bool:
    """Under the engine, as in a run: ZeRO-3 gathers in the forward."""
    optimizer = AdamWFactory(AdamWConfig()).build(model=model, device="cpu", offload=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        check_isolation(engine.module, vocab_size=262, device="cpu")
    except RecipeError:
        return False
    return True


def main() -> None:
    pretrained, out = Path(sys.argv[-2]), Path(sys.argv[-1])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    world = World.from_environment()
    assert world.size == 2
    host = HostGroup(world)
    for name, (shape, dtype) in CASES.items():
        whole = make(shape, seed=3, dtype=dtype, world=world)
        parts = make(shape, seed=3, dtype=dtype, world=world, zero_stage=3)
        assert groups(whole) == groups(parts)
        write(whole, out / f"{name}-0.safetensors", world)
        write(parts, out / f"{name}-3.safetensors", world)
    tokenizer = byte_tokenizer()
    for name in ("llama", "mixtral"):
        parts = make(CASES[name][0], seed=3, world=world, zero_stage=3)
        export(parts, tokenizer, directory=out / "exports" / name, host=host)
    loaded = make(name_or_path=str(pretrained), seed=4, world=world, zero_stage=3)
    write(loaded, out / "pretrained-3.safetensors", world)

    blocked = out / "blocked"
    blocked.touch(exist_ok=True)
    with pytest.raises(ArcticError, match="could not be written"):  # on every rank
        export(loaded, tokenizer, directory=blocked / "export", host=host)

    assert proves(make(TIED, seed=3, world=world, zero_stage=3))
    assert not proves(make(MAMBA, seed=3, world=world, zero_stage=3))
    torch.distributed.barrier()
    if world.is_main:
        (out / "done").touch()


main()
