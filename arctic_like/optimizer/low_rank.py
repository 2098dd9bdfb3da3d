"""GaLore (Zhao et al. 2024, algorithm 2) and APOLLO (Zhu et al. 2025, algorithm 1): AdamW whose states
have the gradient's low rank.

Both packages keep a projector object for each matrix among the states. In a checkpoint stand its tensors
and numbers, so that it can be read without unpickling code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.optimizer.adam import AdamGroupConfig, Betas, within_unit_interval
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.optimizer.groups import parameter_groups
from arctic_like.optimizer.matrices import MatrixConfig, hidden_matrices, split
from arctic_like.optimizer.packages import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PROJECTOR = "projector"
PLAIN = "projector_"
"""What a projector's values are called in a checkpoint begins so."""


class LowRankConfig(MatrixConfig):
    """What GaLore and APOLLO can be told."""

    rank: HumanInt = Field(default=128, ge=1)
    """Rank of the states of hidden matrices."""

    update_interval: HumanInt = Field(default=200, ge=1)
    """Steps between two projections."""

    scale: HumanFloat = Field(default=1.0, gt=0)
    """What the update of hidden matrices is scaled by."""

    betas: Betas = (0.9, 0.999)
    """Decay of the running averages of the projected gradient and of its square."""

    eps: HumanFloat = Field(default=1e-6, gt=0)
    """Added to the root of the second moment, against division by zero."""

    groups: tuple[AdamGroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    _check_betas = field_validator("betas")(within_unit_interval)


class GaLoreConfig(LowRankConfig):
    """GaLore. ZeRO stage 0 only."""

    type: str = "galore"

    scale: HumanFloat = Field(default=0.25, gt=0)
    """What the update of hidden matrices is scaled by (α)."""

    projection: Literal["std", "reverse_std", "left", "right"] = "std"
    """Which side is projected on its singular vectors: `std` the shorter one."""


class ApolloConfig(LowRankConfig):
    """APOLLO. ZeRO stage 0 only."""

    type: str = "apollo"

    rank: HumanInt = Field(default=256, ge=1)
    """Rank of the states of hidden matrices; 1 with `scale_type: tensor` is APOLLO-Mini."""

    scale: HumanFloat = Field(default=1.0, gt=0)
    """The update of hidden matrices is scaled by the square root of it (√α); 128 for APOLLO-Mini."""

    scale_type: Literal["channel", "tensor"] = "channel"
    """Whether the gradient is scaled in each channel, or as a whole."""


class LowRankFactory(OptimizerFactory):
    """What both have in common: the groups, and projectors that can be saved."""

    config: LowRankConfig

    def groups(self, model: nn.Module, **projected: Any) -> list[dict[str, Any]]:
        """torch's groups; those of hidden matrices have `projected` too."""
        config = self.config
        groups = parameter_groups(model, weight_decay=config.weight_decay, groups=config.groups)
        matrices = hidden_matrices(model, adamw_match=config.adamw_match)
        return [
            {**group, **projected} if mine else group for group, mine in split(groups, matrices)
        ]


class GaLoreFactory(LowRankFactory):
    """GaLore of pytorch_optimizer for hidden matrices, AdamW for the rest, at ZeRO stage 0."""

    name = "galore"
    config_type = GaLoreConfig
    config: GaLoreConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """pytorch_optimizer.GaLore. Raises RecipeError without the package."""
        config = self.config
        package = needed("pytorch_optimizer", optimizer=self.name, extra="optimizers")
        projectors = needed(
            "pytorch_optimizer.optimizer.utils.galore", optimizer=self.name, extra="optimizers"
        )
        groups = self.groups(
            model, rank=config.rank, update_proj_gap=config.update_interval, scale=config.scale,
            projection_type=config.projection,
        )  # fmt: skip
        optimizer: Optimizer = package.GaLore(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay,
        )  # fmt: skip

        def made(group: dict[str, Any]) -> Any:
            return projectors.GaLoreProjector(
                rank=group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"],
                projection_type=group["projection_type"],
            )  # fmt: skip

        _save_plainly(optimizer, ("ortho_matrix", "last_svd_step"), made)
        return optimizer


class ApolloFactory(LowRankFactory):
    """APOLLO of its authors for hidden matrices, AdamW for the rest, at ZeRO stage 0."""

    name = "apollo"
    config_type = ApolloConfig
    config: ApolloConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """apollo_torch.APOLLOAdamW. Raises RecipeError without the package.

        A matrix's random projections depend on its place among the parameters, not on the run's seed.
        """
        config = self.config
        package = needed("apollo_torch", optimizer=self.name, extra="apollo")
        projectors = needed("apollo_torch.random_projector", optimizer=self.name, extra="apollo")
        groups = self.groups(
            model, rank=config.rank, update_proj_gap=config.update_interval, scale=config.scale,
            scale_type=config.scale_type, proj="random", proj_type="std",
        )  # fmt: skip
        optimizer: Optimizer = package.APOLLOAdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay,
        )  # fmt: skip

        def made(group: dict[str, Any]) -> Any:
            return projectors.GradientProjector(
                group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"],
                proj_type=group["proj_type"],
            )  # fmt: skip

        optimizer.state.clear()
        optimizer.register_step_pre_hook(_seeds)
        _save_plainly(optimizer, ("ortho_matrix", "seed", "svd_count"), made)
        return optimizer


def _seeds(optimizer: Optimizer, *_: Any) -> None:
    """The package seeds the parameters that it was given, by their numbers. DeepSpeed in low precision
    brings others in their places."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    for number, parameter in enumerate(parameters, 1):
        optimizer.state[parameter].setdefault("seed", number)


def _save_plainly(optimizer: Optimizer, names: tuple[str, ...], made: Any) -> None:
    """Projectors are saved as the values of these attributes, and made again before the next step."""

    def written(_: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["state"] = {
            key: _plain(state, names) for key, state in state_dict["state"].items()
        }

    def revived(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if PLAIN + names[0] in state:
                    projector = made(group)
                    for name in names:
                        setattr(projector, name, state.pop(PLAIN + name))
                    state[PROJECTOR] = projector

    optimizer.register_state_dict_post_hook(written)
    optimizer.register_step_pre_hook(revived)


def _plain(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    if PROJECTOR not in state:
        return state
    rest = {key: value for key, value in state.items() if key != PROJECTOR}
    return {**rest, **{PLAIN + name: getattr(state[PROJECTOR], name) for name in names}}
