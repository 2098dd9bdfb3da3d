"""What a recipe says of an optimizer, and how parameters are grouped for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.values import HumanFloat
from arctic_like.registry import Part

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class OptimizerConfig(PartConfig):
    """The recipe's `optimizer:`."""

    aliases = {"lr": "learning_rate"}

    type: str = "adamw"
    """Which optimizer: `adamw`, `fused_adam`, `cpu_adam`, or a user's own."""

    learning_rate: HumanFloat = Field(default=5e-4, ge=0)
    """The highest learning rate; the scheduler scales it from step to step."""

    weight_decay: HumanFloat = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices and embeddings; norms and biases are never decayed."""

    betas: tuple[HumanFloat, HumanFloat] = (0.9, 0.999)
    """Decay of the running averages of the gradient and of its square."""

    eps: HumanFloat = Field(default=1e-8, gt=0)
    """Added to the root of the second moment, against division by zero."""

    @field_validator("betas")
    @classmethod
    def _within_unit_interval(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise wrong(f"are {betas[0]} and {betas[1]}; both must be at least 0 and below 1")
        return betas


class OptimizerFactory(Part, family="optimizer"):
    """Builds the optimizer of a run."""

    config_type = OptimizerConfig
    config: OptimizerConfig

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """The plain torch optimizer over the model's trainable parameters.

        device: where the parameters are trained, "cpu" or "cuda:0".
        offload: whether DeepSpeed keeps optimizer states and runs the update on the CPU.
        Raises RecipeError where the optimizer cannot run here.
        """
        raise NotImplementedError


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters as up to two groups: with and without weight decay.

    Without: biases, norms, and every other parameter of less than two dimensions. Shared
    parameters count once. The same groups in the same order at every ZeRO stage: ZeRO-3 leaves
    an empty shard in a parameter's place, so its shape is read from `ds_shape` there.
    """
    exempt = _norm_parameters(model)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter in exempt or not _decays(name, parameter)
            (plain if spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # A mixture of experts stacks biases into matrices (`gate_up_proj_bias`): the name goes first.
    leaf = name.rpartition(".")[2].lower()
    return not leaf.endswith("bias") and len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def _norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    norms = (module for module in model.modules() if "norm" in type(module).__name__.lower())
    return {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
