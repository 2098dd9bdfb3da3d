"""What a recipe says of memory, done to the models that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from arctic_like.engine.ds_section import zero_stage
from arctic_like.errors import Problem
from arctic_like.model.adapters.config import PROMPTS, kind_of
from arctic_like.trainer.surface import MAIN

if TYPE_CHECKING:
    from torch import nn


def memory_problems(config: Any) -> Iterator[Problem]:
    """What of it cannot be combined, known from the recipe alone."""
    from arctic_like.trainer.assembly import learner_configs

    for name, part in learner_configs(config).items():
        section = part.deepspeed if part.deepspeed is not None else config.deepspeed
        prefix = "" if name == MAIN else f"{name}."
        yield from _bf16_problems(prefix, part, section)
        yield from _compile_problems(f"{prefix}model", config, part, section)
        selective = getattr(part.model, "activation_checkpointing", None) == "selective"
        if selective and zero_stage(section) == 3:
            yield Problem(
                "is selective, which DeepSpeed's ZeRO 3 cannot follow: a layer that gathers its weights "
                "again does not repeat the operations of the forward pass",
                place=f"{prefix}model.activation_checkpointing",
                hint="set it to full, or use ZeRO 2",
            )


def _compile_problems(
    place: str, config: Any, part: Any, section: Mapping[str, Any]
) -> Iterator[Problem]:
    """What layers that are compiled (`model.compile`) are not combined with."""
    model = part.model
    if not getattr(model, "compile", False):
        return
    reasons = {
        "ZeRO 3, whose layers gather their weights in hooks": zero_stage(section) == 3,
        "sequence_parallel_size, whose layers exchange parts of rows": config.sequence_parallel_size
        > 1,
        "tiled_mlp_compute": config.tiled_mlp_compute,
        "activation_checkpoint_cpu_offload": config.activation_checkpoint_cpu_offload,
        "activation_checkpointing: selective": (
            getattr(model, "activation_checkpointing", None) == "selective"
        ),
        "virtual tokens (prompt and prefix tuning)": (
            kind_of(getattr(model, "peft_config", None) or {}) in PROMPTS
        ),
        "a quantised base": getattr(model, "quantization", None) is not None,
        "type: liger, whose kernels are fused already": model.type == "liger",
        "deterministic: true, since what is compiled depends on the lengths of the first rows": (
            config.deterministic
        ),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        yield Problem(
            f"cannot be combined with {reason}", place=f"{place}.compile", hint="leave it out"
        )


def _bf16_problems(prefix: str, part: Any, section: Mapping[str, Any]) -> Iterator[Problem]:
    bf16 = section.get("bf16") or section.get("bfloat16") or {}
    keys = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    stage = zero_stage(section)
    if any(bf16.get(key) for key in keys) and stage < 2:
        yield Problem(
            f"keeps bf16 weights at ZeRO 2 and 3; at {stage} DeepSpeed keeps fp32 ones without a word",
            place="deepspeed.bf16",
            hint="set deepspeed.zero_optimization.stage to 2 or 3, or remove these keys",
        )
    if getattr(part.optimizer, "type", "") == "adamw_bf16" and not all(bf16.get(k) for k in keys):
        yield Problem(
            "is adamw_bf16, and DeepSpeed would give it fp32 weights",
            place=f"{prefix}optimizer.type",
            hint=f"set deepspeed.bf16: {{{keys[0]}: true, {keys[1]}: true}}, or take adamw",
        )


def spare_memory(config: Any, module: nn.Module, *, zero_stage: int) -> None:
    """Tile a trained model's MLPs and send its checkpoints to the host, as the recipe asks. Raises
    RecipeError where the model has none."""
    from loguru import logger

    from arctic_like.engine.layout import training_device
    from arctic_like.model.activations import offload_checkpoints
    from arctic_like.model.tiled_mlp import tile_mlps

    if config.tiled_mlp_compute:
        tile_mlps(module, zero_stage=zero_stage)
    if config.activation_checkpoint_cpu_offload:
        if training_device() == "cpu":
            logger.warning(
                "activation_checkpoint_cpu_offload has no effect: the model is on the CPU"
            )
        else:
            offload_checkpoints(module)
