"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), three times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.optimizer.base import OptimizerConfig, OptimizerFactory, parameter_groups

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class AdamWConfig(OptimizerConfig):
    """AdamW of torch: works on every device, with and without offload."""

    type: str = "adamw"


class FusedAdamConfig(OptimizerConfig):
    """DeepSpeed's FusedAdam: CUDA only."""

    type: str = "fused_adam"


class CPUAdamConfig(OptimizerConfig):
    """DeepSpeed's CPU Adam, for parameters or optimizer states that are offloaded to the CPU."""

    type: str = "cpu_adam"


class AdamWFactory(OptimizerFactory):
    """torch's AdamW, fused: on every device, with and without offload."""

    name = "adamw"
    config_type = AdamWConfig

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """torch's AdamW in its fused form on CPU and CUDA.

        On the CPU the fused form takes a third of the plain one's time, is as exact, and gives the
        same numbers wherever ZeRO cuts the parameters apart.
        """
        import torch

        kind = "cpu" if offload else torch.device(device).type
        fused = True if kind in ("cpu", "cuda") else None
        groups, arguments = _arguments(self.config, model)
        return torch.optim.AdamW(groups, **arguments, fused=fused)


class FusedAdamFactory(OptimizerFactory):
    """DeepSpeed's FusedAdam, on CUDA."""

    name = "fused_adam"
    config_type = FusedAdamConfig

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """DeepSpeed's FusedAdam. Raises RecipeError where the update is not done on CUDA."""
        if offload or not device.startswith("cuda"):
            where = (
                "the optimizer is offloaded to the CPU" if offload else f"this run is on {device}"
            )
            raise RecipeError(
                Problem(
                    f"fused_adam is a CUDA kernel, and {where}",
                    place="optimizer.type",
                    hint="set optimizer.type to adamw (any device) or cpu_adam (made for offload)",
                )
            )
        from deepspeed.ops.adam import FusedAdam

        groups, arguments = _arguments(self.config, model)
        return FusedAdam(groups, **arguments, adam_w_mode=True)  # type: ignore[no-any-return]


class CPUAdamFactory(OptimizerFactory):
    """DeepSpeed's Adam on the CPU, for offloaded states."""

    name = "cpu_adam"
    config_type = CPUAdamConfig

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """DeepSpeed's CPU Adam. Raises RecipeError where the update is done on a GPU."""
        if not offload and device != "cpu":
            raise RecipeError(
                Problem(
                    f"cpu_adam updates on the CPU, but this run is on {device} without offload",
                    place="optimizer.type",
                    hint="set deepspeed.zero_optimization.offload_optimizer.device to cpu, "
                    "or optimizer.type to adamw",
                )
            )
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        groups, arguments = _arguments(self.config, model)
        try:
            return DeepSpeedCPUAdam(groups, **arguments, adamw_mode=True)  # type: ignore[no-any-return]
        except (RuntimeError, ImportError, OSError) as error:
            raise RecipeError(
                Problem(
                    f"DeepSpeed cannot compile its CPU Adam here: {str(error).splitlines()[0]}",
                    place="optimizer.type",
                    hint="install a C++ compiler and ninja, or set optimizer.type to adamw",
                )
            ) from error


def _arguments(
    config: OptimizerConfig, model: nn.Module
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    groups = parameter_groups(model, weight_decay=config.weight_decay)
    return groups, {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
