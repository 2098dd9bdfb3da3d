"""Any optimizer by its dotted path: `optimizer: {type: torch.optim.SGD, lr: 0.1, momentum: 0.9}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import ConfigDict, Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError
from arctic_like.optimizer.base import GroupConfig, OptimizerConfig, OptimizerFactory
from arctic_like.optimizer.groups import GROUP, parameter_groups
from arctic_like.registry.dotted import (
    check_arguments,
    import_class,
    is_dotted,
    parameters,
    with_numbers,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

RATE_NAMES = ("lr", "learning_rate")
PLACE = "optimizer"


class DottedGroupConfig(GroupConfig):
    """Some parameters with settings of their own: any argument that the class takes for each group."""

    model_config = ConfigDict(extra="allow")


class DottedOptimizerConfig(OptimizerConfig):
    """An optimizer by its dotted path. Other keys are arguments of the class."""

    model_config = ConfigDict(extra="allow")

    type: str = "module.Class"
    """The class's dotted path, such as `torch.optim.SGD`; imported when the run starts."""

    learning_rate: HumanFloat | None = Field(default=None, ge=0)  # type: ignore[assignment]
    """The highest learning rate (the class's `lr`); the class's own default unless given."""

    weight_decay: HumanFloat | None = Field(default=None, ge=0)  # type: ignore[assignment]
    """Weight decay of matrices and embeddings, as the class means it; its own default unless given.
    Norms and biases are never decayed."""

    groups: tuple[DottedGroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    @model_validator(mode="after")
    def _is_a_path(self) -> Self:
        if not is_dotted(self.type):
            raise wrong(
                f"is {self.type!r}, not a class's dotted path",
                place="type",
                hint="write it as an import would: torch.optim.SGD",
            )
        return self


class DottedOptimizerFactory(OptimizerFactory):
    """Any optimizer class by its dotted path, such as `torch.optim.SGD`; other keys are its arguments."""

    name = "module.Class"
    config_type = DottedOptimizerConfig
    config: DottedOptimizerConfig

    def build(self, *, model: nn.Module) -> Optimizer:  # type: ignore[override]
        """The class over the model's parameter groups.

        `learning_rate` is its `lr`. Parameters are grouped by decay where the class knows
        `weight_decay`. Raises RecipeError naming the arguments that it takes, and where it is no
        torch optimizer.
        """
        import torch

        config = self.config
        cls = import_class(config.type, place=f"{PLACE}.type")
        if not issubclass(cls, torch.optim.Optimizer):
            raise RecipeError(
                Problem(f"is {config.type!r}, which is no torch.optim.Optimizer", f"{PLACE}.type")
            )
        known = parameters(cls)
        params = next(iter(known), "params")
        rate_key = next((name for name in RATE_NAMES if name in known), RATE_NAMES[0])
        arguments = {key: with_numbers(value) for key, value in (config.model_extra or {}).items()}
        if config.learning_rate is not None:
            arguments[rate_key] = config.learning_rate
        if config.weight_decay is not None:
            arguments["weight_decay"] = config.weight_decay
        check_arguments(cls, arguments, place=PLACE, ours=[params])
        groups = parameter_groups(
            model,
            weight_decay=_decay(cls, arguments),
            groups=[group.model_copy(update=_numbers(group)) for group in config.groups],
        )
        try:
            optimizer: Optimizer = cls(groups, **arguments)
        except (TypeError, ValueError) as error:
            raise RecipeError(
                Problem(f"{cls.__qualname__} refuses its settings: {error}", PLACE)
            ) from error
        _check_groups(optimizer, config)
        return optimizer


def _numbers(group: DottedGroupConfig) -> dict[str, Any]:
    return {key: with_numbers(value) for key, value in (group.model_extra or {}).items()}


def _decay(cls: type, arguments: dict[str, Any]) -> float | None:
    """The weight decay of parameters that no group says otherwise of; None: the class knows none."""
    if "weight_decay" in arguments:
        return float(arguments["weight_decay"])
    known = parameters(cls).get("weight_decay")
    default = known.default if known is not None else None
    return float(default) if isinstance(default, int | float) else None


def _check_groups(optimizer: Optimizer, config: DottedOptimizerConfig) -> None:
    """Every group has a learning rate to schedule, and no setting that the class would not read."""
    problems = []
    for number, group in enumerate(config.groups):
        for key in group.stated():
            name = "lr" if key == "learning_rate" else key
            if name not in optimizer.defaults:
                takes = ", ".join(sorted(optimizer.defaults))
                problems.append(
                    Problem(
                        f"is nothing that {type(optimizer).__qualname__} takes for a group",
                        f"{PLACE}.groups.{number}.{key}",
                        f"it takes {takes}",
                    )
                )
    for group_ in optimizer.param_groups:
        if not isinstance(group_.get("lr"), int | float) and not problems:
            problems.append(
                Problem(
                    f"is needed: {type(optimizer).__qualname__} has no learning rate of its own "
                    "that a schedule could scale",
                    f"{PLACE}.learning_rate",
                    f"state it{' for the group too' if group_[GROUP] else ''}",
                )
            )
    if problems:
        raise RecipeError(problems)
