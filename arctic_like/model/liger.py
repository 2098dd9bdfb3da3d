"""Models of transformers with the Triton kernels of liger-kernel (CUDA only)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.model.huggingface import HFModelConfig, HFModelFactory

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from arctic_like.world import World


class LigerModelConfig(HFModelConfig):
    """A model of transformers with liger-kernel's kernels."""

    type: str = "liger"


class LigerModelFactory(HFModelFactory):
    """The same models with norms, rotary embeddings and MLPs fused by Liger; same weights."""

    name = "liger"
    config_type = LigerModelConfig

    def create_model(
        self, config: PretrainedConfig, *, seed: int, world: World, zero: dict[str, Any] | None
    ) -> PreTrainedModel:
        """See `HFModelFactory.create_model`. Raises RecipeError without CUDA or liger-kernel."""
        kernels = liger_kernels(config.model_type, device=world.device)
        model = super().create_model(config, seed=seed, world=world, zero=zero)
        # The loss is the trainer's: it needs logits, which the fused loss would not make.
        kernels._apply_liger_kernel_to_instance(
            model=model, fused_linear_cross_entropy=False, cross_entropy=False
        )
        return model


def liger_kernels(model_type: str, *, device: str) -> Any:
    """liger-kernel's module that patches models, in this process for all models of a type.

    Raises RecipeError, naming the way out, where it cannot be used.
    """
    hint = "set model.type to huggingface, which trains the same weights"
    if not device.startswith("cuda"):
        message = f"liger-kernel needs a CUDA device, and this run is on {device}"
        raise RecipeError(Problem(message, place="model.type", hint=hint))
    try:
        kernels = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        message = f"liger-kernel is not installed ({error})"
        raise RecipeError(
            Problem(message, place="model.type", hint=f"pip install liger-kernel; or {hint}")
        ) from error
    if model_type not in kernels.MODEL_TYPE_TO_APPLY_LIGER_FN:
        message = f"liger-kernel has no kernels for {model_type}"
        raise RecipeError(Problem(message, place="model.type", hint=hint))
    return kernels
