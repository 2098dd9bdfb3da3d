"""Muon for hidden matrices, AdamW for everything else (Jordan et al. 2024; Liu et al. 2025).

DeepSpeed (0.19.8) has a Muon for ZeRO 1 to 3, which is not used: it clips, and reports the norm of, what
is orthogonal already, so that the default clipping scales every update by the norm of all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from arctic_like.config.values import HumanFloat
from arctic_like.optimizer.adam import AdamGroupConfig, Betas, within_unit_interval
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.matrices import MatrixConfig, hidden_matrices, split
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class MuonGroupConfig(AdamGroupConfig):
    """Some parameters with settings of their own."""

    momentum: Annotated[HumanFloat, Field(ge=0, lt=1)] | None = None
    """The group's `momentum`, of its matrices."""


class MuonConfig(MatrixConfig):
    """Muon. ZeRO stage 0 only."""

    type: str = "muon"

    momentum: HumanFloat = Field(default=0.95, ge=0, lt=1)
    """Decay of the running average of the gradient that is made orthogonal."""

    nesterov: bool = True
    """Nesterov's momentum."""

    ns_steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations, in bf16."""

    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What an (a × b) matrix's update is scaled by: `match_rms_adamw` 0.2·√max(a, b), so that AdamW's
    learning rates are right (Liu et al. 2025, equation 4); `original` √max(1, a/b), with rates about 0.02."""

    adamw_learning_rate: Annotated[HumanFloat, Field(ge=0)] | None = None
    """Learning rate of what AdamW updates; `learning_rate` unless given. A group's own is for both."""

    betas: Betas = (0.9, 0.95)
    """AdamW's: decay of the running averages of the gradient and of its square."""

    eps: HumanFloat = Field(default=1e-8, gt=0)
    """AdamW's: added to the root of the second moment."""

    groups: tuple[MuonGroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    _check_betas = field_validator("betas")(within_unit_interval)


class MuonFactory(OptimizerFactory):
    """Muon of pytorch_optimizer for hidden matrices, AdamW for the rest, at ZeRO stage 0."""

    name = "muon"
    config_type = MuonConfig
    config: MuonConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """pytorch_optimizer.Muon, which does both. Raises RecipeError without the package.

        Matrices are linear layers' weights and convolutions' filters; experts' stacked matrices,
        embeddings, output layers, norms and biases are AdamW's.
        """
        config = self.config
        package = needed("pytorch_optimizer", optimizer=self.name, extra="optimizers")
        matrices = hidden_matrices(model, adamw_match=config.adamw_match, filters=True)
        groups = parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups)
        optimizer: Optimizer = package.Muon(
            [self._complete(group, muon) for group, muon in split(groups, matrices)],
            lr=config.learning_rate,
        )
        return optimizer

    def _complete(self, group: dict[str, Any], muon: bool) -> dict[str, Any]:
        config = self.config
        if muon:
            mine = {key: value for key, value in group.items() if key not in ("betas", "eps")}
            return {
                "lr": config.learning_rate, "momentum": config.momentum,
                "nesterov": config.nesterov, "ns_steps": config.ns_steps,
                "use_adjusted_lr": config.scale == "match_rms_adamw", **mine, "use_muon": True,
            }  # fmt: skip
        rate = config.adamw_learning_rate
        mine = {key: value for key, value in group.items() if key != "momentum"}
        return {
            "lr": config.learning_rate if rate is None else rate,
            "betas": config.betas, "eps": config.eps, **mine, "use_muon": False,
        }  # fmt: skip
