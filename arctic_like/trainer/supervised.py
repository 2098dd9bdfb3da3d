"""`supervised`: any model whose outputs are compared with targets, by criteria that the recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from arctic_like.config.base import PartConfig
from arctic_like.config.values import OneOrMany
from arctic_like.errors import RunError
from arctic_like.loss import Loss
from arctic_like.registry import build
from arctic_like.registry.choice import Choice
from arctic_like.run_info import supply
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from torch import Tensor

_PAIRS = (("inputs", "targets"), ("input", "target"), ("x", "y"), ("image", "label"),
          ("images", "labels"))  # fmt: skip


class SupervisedConfig(TrainerConfig):
    """A recipe of `type: supervised`."""

    type: str = "supervised"
    """The trainer: outputs of any model against targets."""

    criterion: Annotated[
        list[Annotated[PartConfig, Choice("criterion", short="type", default="cross_entropy")]],
        OneOrMany(),
    ] = Field(default_factory=lambda: [{"type": "cross_entropy"}], min_length=1)  # type: ignore[arg-type]
    """The loss, or several whose weighted sum is the loss."""

    metrics: dict[str, Annotated[PartConfig, Choice("metric", short="type")]] = Field(
        default_factory=dict
    )
    """What evaluations measure beside the loss: name → metric."""

    inputs: str = ""
    """Key of the model's input in a batch that is a map; found among inputs, x, image … unless given."""

    targets: str = ""
    """Key of the targets in a batch that is a map; found among targets, y, label … unless given."""


class SupervisedTrainer(Trainer):
    """The loss is the weighted sum of the criteria of `model(inputs)` and the targets, over rows.

    A batch is a pair (inputs, targets), or a map that holds them. Criteria are called as they are: one
    that takes the mean over rows makes the gradient that of the mean over the global batch.
    """

    name = "supervised"
    config_type: ClassVar[type[TrainerConfig]] = SupervisedConfig
    data_factory_type: ClassVar[Any] = ("torch",)
    model_factory_type: ClassVar[Any] = ("torch",)
    tokenizer_factory_type: ClassVar[Any] = ("none",)

    @cached_property
    def _criteria(self) -> list[Any]:
        criteria = [build(config, "criterion") for config in self.config.criterion]
        for criterion in criteria:
            supply(criterion.setup, self.equipment.info)
        return criteria

    def get_val_metrics(self) -> dict[str, Any]:
        """The recipe's `metrics`, with what the data publishes."""
        return {
            name: build(config, "metric").build(facts=dict(self.facts))
            for name, config in self.config.metrics.items()
        }

    def parts(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, targets) of a batch. Raises RunError where it is not clear which they are."""
        if isinstance(batch, Mapping):
            stated = (self.config.inputs, self.config.targets)
            for inputs, targets in [stated, *_PAIRS]:
                if inputs in batch and targets in batch:
                    return batch[inputs], batch[targets]
            raise RunError(
                f"a batch has the keys {', '.join(map(str, batch))}; "
                "say which are the model's with `inputs` and `targets`"
            )
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        raise RunError(
            f"a batch is {type(batch).__name__}; expected is a pair (inputs, targets) or a map"
        )

    def outputs(self, inputs: Any) -> Any:
        """The model's outputs."""
        return self.model(inputs)

    def model_arguments(self, batch: Any) -> tuple[Any, ...]:
        """The inputs."""
        return (self.parts(batch)[0],)

    def loss(self, batch: Any) -> Tensor | Loss:
        """The weighted sum of the criteria; each is logged where there are several."""
        inputs, targets = self.parts(batch)
        return self._compared(self.outputs(inputs), targets)

    def _compared(self, outputs: Any, targets: Any) -> Loss:
        found = {c.config.title: c(outputs, targets) for c in self._criteria}
        total = sum(found[c.config.title] * c.config.weight for c in self._criteria)
        several = {name: value.detach() for name, value in found.items()} if len(found) > 1 else {}
        return Loss(total, values=several)

    def validation_step(self, batch: Any) -> Any:
        """The loss; the metrics are updated."""
        inputs, targets = self.parts(batch)
        outputs = self.outputs(inputs)
        for metric in self.val_metrics.values():
            metric.update(outputs, targets)
        return self._compared(outputs, targets)
