"""What a recipe says of an optimizer, and how parameters are grouped for it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, get_args

from pydantic import Field, field_validator, model_validator

from arctic_like.config.base import Config, PartConfig, wrong
from arctic_like.config.values import HumanFloat
from arctic_like.registry import Part
from arctic_like.registry.choice import Choice

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


LORA_B = r"\.lora_B\."
"""The names of LoRA's B matrices."""


class GroupConfig(Config):
    """Some parameters with settings of their own; what a group leaves out is the optimizer's."""

    aliases = {"lr": "learning_rate"}

    match: str
    """A regular expression, searched for in the parameters' names (`^lm_head`). A parameter
    belongs to the first group that matches."""

    name: str = ""
    """The group's name in the metrics, `learning_rate/<name>`; `match` unless given."""

    learning_rate: Annotated[HumanFloat, Field(ge=0)] | None = None
    """The group's highest learning rate."""

    weight_decay: Annotated[HumanFloat, Field(ge=0)] | None = None
    """Weight decay of the group's matrices and embeddings; norms and biases are never decayed."""

    scheduler: Annotated[PartConfig, Choice("scheduler")] | None = None
    """The group's own schedule, which scales the group's `learning_rate`; the recipe's `scheduler`
    unless given."""

    @field_validator("match")
    @classmethod
    def _is_a_pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise wrong(f"is {match!r}, not a regular expression: {error}") from None
        if not match:
            raise wrong("is empty, and would match every parameter", hint="write `.` for all")
        return match

    @property
    def label(self) -> str:
        """The group's name: as stated, or its pattern."""
        return self.name or self.match

    def stated(self) -> dict[str, Any]:
        """What the group sets, by the recipe's names, without what finds and schedules it."""
        names = [n for n in type(self).model_fields if n not in ("match", "name", "scheduler")]
        values = {name: getattr(self, name) for name in names} | (self.model_extra or {})
        return {name: value for name, value in values.items() if value is not None}


class OptimizerConfig(PartConfig):
    """The recipe's `optimizer:`."""

    aliases = {"lr": "learning_rate"}

    type: str = "adamw"
    """Which optimizer: a registered name, or a class by its dotted path (`torch.optim.SGD`)."""

    learning_rate: HumanFloat = Field(default=5e-4, ge=0)
    """The highest learning rate; the scheduler scales it from step to step."""

    weight_decay: HumanFloat = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices and embeddings; norms and biases are never decayed."""

    groups: tuple[GroupConfig, ...] = ()
    """Parameters with settings of their own; all that no group matches have the optimizer's."""

    loraplus_lr_ratio: HumanFloat | None = Field(default=None, gt=0)
    """LoRA+: the learning rate of LoRA's B matrices is so many times that of the A matrices; 16 is what
    its authors advise. In the metrics it is `learning_rate/lora_B`."""

    @model_validator(mode="after")
    def _loraplus(self) -> Self:
        """Hayou et al. 2024, section 4: η_B = λ·η_A. One more group, behind the recipe's own."""
        ratio = self.loraplus_lr_ratio
        if ratio is None:
            return self
        if self.learning_rate is None:
            raise wrong("is needed: loraplus_lr_ratio multiplies it", place="learning_rate")
        kind: type[GroupConfig] = get_args(type(self).model_fields["groups"].annotation)[0]
        more = kind(match=LORA_B, name="lora_B", learning_rate=ratio * self.learning_rate)
        own = [group for group in self.groups if group.match != LORA_B]  # a copy has it already
        self.__dict__["groups"] = (*own, more)
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        labels = [group.label for group in self.groups]
        for number, label in enumerate(labels):
            if label in labels[:number]:
                raise wrong(
                    f"is {label!r}, which an earlier group is called too",
                    place=f"groups.{number}.{'name' if self.groups[number].name else 'match'}",
                    hint="give it another `name`",
                )
        return self


class OptimizerFactory(Part, family="optimizer"):
    """Builds the optimizer of a run."""

    config_type: ClassVar[type[PartConfig]] = OptimizerConfig
    config: OptimizerConfig
    dotted: ClassVar[str] = "module.Class"

    def build(self, *, model: nn.Module, device: str, offload: bool) -> Optimizer:
        """The plain torch optimizer over the model's trainable parameters.

        device: where the parameters are trained, "cpu" or "cuda:0".
        offload: whether DeepSpeed keeps optimizer states and runs the update on the CPU.
        Its groups come from `optimizer.groups.parameter_groups`, which reads `config.groups`.
        Raises RecipeError where the optimizer cannot run here.
        """
        raise NotImplementedError
