"""Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), three times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError
from arctic_like.optimizer.base import GroupConfig, OptimizerConfig, OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


Betas = tuple[HumanFloat, HumanFloat]


def within_unit_interval(betas: Betas | None) -> Betas | None:
    """A validator: both are at least 0 and below 1."""
    if betas is not None and not all(0 <= beta < 1 for beta in betas):
        raise wrong(f"are {betas[0]} and {betas[1]}; both must be at least 0 and below 1")
    return betas


class AdamGroupConfig(GroupConfig):
    """Some parameters with settings of their own."""

    betas: Betas | None = None
    """The group's `betas`."""

    eps: Annotated[HumanFloat, Field(gt=0)] | None = None
    """The group's `eps`."""

    _check_betas = field_validator("betas")(within_unit_interval)


class AdamConfig(OptimizerConfig):
    """What all forms of Adam can be told."""

    betas: Betas = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""

    eps: HumanFloat = Field(default=1e-8, gt=0)
    """Added to the root of the second moment, against division by zero."""

    groups: tuple[AdamGroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    _check_betas = field_validator("betas")(within_unit_interval)


class AdamWConfig(AdamConfig):
    """AdamW of torch: works on every device, with and without offload."""

    type: str = "adamw"


class FusedAdamConfig(AdamConfig):
    """DeepSpeed's FusedAdam: CUDA only."""

    type: str = "fused_adam"


class CPUAdamConfig(AdamConfig):
    """DeepSpeed's CPU Adam, for parameters or optimizer states that are offloaded to the CPU."""

    type: str = "cpu_adam"


class AdamWFactory(OptimizerFactory):
    """torch's AdamW, fused: on every device, with and without offload."""

    name = "adamw"
    config_type = AdamWConfig
    config: AdamWConfig

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """torch's AdamW in its fused form on CPU and CUDA.

        On the CPU the fused form takes a third of the plain one's time, is as exact, and gives the
        same numbers wherever ZeRO cuts the parameters apart.
        """
        import torch

        kind = "cpu" if offload else torch.device(device).type
        fused = True if kind in ("cpu", "cuda") else None
        groups, arguments = adam_arguments(self.config, model)
        return torch.optim.AdamW(groups, **arguments, fused=fused)


class FusedAdamFactory(OptimizerFactory):
    """DeepSpeed's FusedAdam, on CUDA."""

    name = "fused_adam"
    config_type = FusedAdamConfig
    config: FusedAdamConfig

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

        groups, arguments = adam_arguments(self.config, model)
        return FusedAdam(groups, **arguments, adam_w_mode=True)  # type: ignore[no-any-return]


class FusedAdamMoEFactory(FusedAdamFactory):
    """`fused_adam` by the name that ArcticTraining's recipes of experts use: here every rank holds
    all experts, which need no groups of their own."""

    name = "fused_adam_moe"


class CPUAdamFactory(OptimizerFactory):
    """DeepSpeed's Adam on the CPU, for offloaded states."""

    name = "cpu_adam"
    config_type = CPUAdamConfig
    config: CPUAdamConfig

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

        groups, arguments = adam_arguments(self.config, model)
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


def adam_arguments(
    config: AdamConfig, model: nn.Module
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(groups of parameters, the other arguments) of an Adam that has torch's names for them."""
    groups = parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups)
    return groups, {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
