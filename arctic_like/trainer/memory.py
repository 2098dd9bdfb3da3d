"""What a recipe says of memory, done to the models that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arctic_like.engine.ds_section import zero_stage
from arctic_like.errors import Problem

if TYPE_CHECKING:
    from torch import nn


def memory_problems(config: Any) -> Iterator[Problem]:
    """What of it cannot be combined, known from the recipe alone."""
    from arctic_like.trainer.assembly import learner_configs

    for name, part in learner_configs(config).items():
        section = part.deepspeed if part.deepspeed is not None else config.deepspeed
        selective = getattr(part.model, "activation_checkpointing", None) == "selective"
        if selective and zero_stage(section) == 3:
            yield Problem(
                "is selective, which DeepSpeed's ZeRO 3 cannot follow: a layer that gathers its weights "
                "again does not repeat the operations of the forward pass",
                place=f"{'' if name == 'model' else f'{name}.'}model.activation_checkpointing",
                hint="set it to full, or use ZeRO 2",
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
