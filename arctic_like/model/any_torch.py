"""`type: torch`: any `torch.nn.Module` by its class, with arguments from the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from arctic_like.config.values import DType
from arctic_like.errors import Problem, RecipeError
from arctic_like.model.base import ModelConfig, ModelFactory

if TYPE_CHECKING:
    from torch import nn


class TorchModelConfig(ModelConfig):
    """`type: torch`: a module by its class."""

    aliases = {"class": "class_path"}

    type: str = "torch"
    """`torch`: any module by its class."""

    class_path: str = Field(default="", min_length=1)
    """The class: a dotted path (`torchvision.models.ResNet`, a module beside the `code:` file) or
    the name of a class in the `code:` file. Also written `class`."""

    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the class."""

    dtype: DType = "fp32"
    """The weights' dtype in training."""

    trainable: str = ""
    """Regular expression of the parameters that are trained; all unless given."""


class TorchModelFactory(ModelFactory):
    """Builds the class once on the CPU; at ZeRO stage 3 the engine divides it among the ranks.

    Initial weights are drawn by the class itself under a generator seeded by the recipe's seed, in
    every process alike, so neither stage nor ranks matter.
    """

    name = "torch"
    config_type = TorchModelConfig
    config: TorchModelConfig

    def build(  # type: ignore[override]
        self, *, seed: int, learner: str = "model", facts: Mapping[str, Any] | None = None
    ) -> nn.Module:
        """The module, its dtype set. Arguments that the class has and the recipe does not state are
        filled from what the data publishes (`num_classes`, `image_size`), by name.

        learner: whose model it is; several learners of one class begin with different weights.

        Raises RecipeError where there is no such class, or its arguments do not fit.
        """
        from arctic_like.model.randomness import seed_by_name, untouched_randomness
        from arctic_like.registry.dotted import check_arguments, parameters, with_numbers

        cls = self._class()
        arguments = {key: with_numbers(value) for key, value in self.config.kwargs.items()}
        for name, value in (facts or {}).items():
            if name in parameters(cls) and name not in arguments:
                arguments[name] = value
        check_arguments(cls, arguments, place="model.kwargs")
        with untouched_randomness():
            seed_by_name(seed, learner)
            module: nn.Module = cls(**arguments)
        module = module.to(_dtype(self.config.dtype))
        self._freeze(module)
        return module

    def _class(self) -> type[nn.Module]:
        from torch import nn

        from arctic_like.registry.named import find_object

        found = find_object(self.config.class_path, place="model.class")
        if not isinstance(found, type) or not issubclass(found, nn.Module):
            raise RecipeError(
                Problem(
                    f"is {self.config.class_path!r}, which is no torch.nn.Module", "model.class"
                )
            )
        return found

    def _freeze(self, module: nn.Module) -> None:
        import re

        if not self.config.trainable:
            return
        pattern = re.compile(self.config.trainable)
        names = [name for name, _ in module.named_parameters()]
        if not any(pattern.search(name) for name in names):
            raise RecipeError(
                Problem(
                    f"matches no parameter; there are {', '.join(names[:5])} …",
                    "model.trainable",
                    "a regular expression that is found in the names to train",
                )
            )
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(pattern.search(name) is not None)


def _dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
