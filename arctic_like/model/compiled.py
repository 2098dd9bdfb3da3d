"""`model.compile: blocks`: each layer of a model compiled by itself (`torch.compile`), in place.

Names, parameters and hooks stay, and so do checkpoints, adapters and ZeRO 0 to 2. What is compiled is the
forward pass with gradients, and its backward: evaluation, generation and probes run as written, so that
their shapes and caches compile nothing. Layers of one kind share what was compiled. Rows of a second length
compile each kind once more, from then on for any length.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import nn

GRAPHS = 64
"""How often a layer may be compiled anew before torch runs it as written: kinds of layers, with and without
a mask, of a fixed and of any length."""


def compile_blocks(model: nn.Module, *, device: str, zero_stage: int) -> None:
    """Compile every layer of a transformers model when it is first called with gradients.

    Raises RecipeError where it cannot be.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    if zero_stage == 3:
        raise RecipeError(_problem("not at ZeRO 3, whose layers gather their weights in hooks"))
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise RecipeError(_problem(f"{type(model).__name__} has no layers known to transformers"))
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None:
        raise RecipeError(_problem(f"on a CPU it needs a C++ compiler, and there is no {compiler}"))
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    for layer in layers:
        layer.compile()
        # what `nn.Module.__call__` calls in place of `_call_impl`; copies and pickles leave it out
        compiled: Any = layer._compiled_call_impl
        layer._compiled_call_impl = _with_gradients(compiled, layer._call_impl)


def _with_gradients(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return call


def _problem(reason: str) -> Problem:
    return Problem(f"cannot be had: {reason}", place="model.compile", hint="leave it out")
