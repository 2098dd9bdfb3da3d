"""Criteria and metrics that a recipe names: what a model's outputs are compared with their targets by.

criterion: {type: cross_entropy}                      one loss
criterion:                                            several, weighted
  - {type: mse, weight: 1.0}
  - {type: torch.nn.HuberLoss, weight: 0.1, delta: 0.5}
metrics: {accuracy: {type: accuracy}, f1: {type: torchmetrics.F1Score, task: multiclass, num_classes: 10}}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict

from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanFloat
from arctic_like.registry import Part

if TYPE_CHECKING:
    from torch import Tensor


class CriterionConfig(PartConfig):
    """One loss."""

    model_config = ConfigDict(extra="allow")

    type: str = "cross_entropy"
    """A registered criterion, or a `torch.nn` loss class by its dotted path."""

    weight: HumanFloat = 1.0
    """Its share in the sum."""

    label: str = ""
    """Its name in metrics; the type's unless given."""

    @property
    def title(self) -> str:
        """Its name in metrics."""
        return self.label or self.type.rpartition(".")[2]

    def arguments(self) -> dict[str, Any]:
        """The further keys: arguments of the loss."""
        from arctic_like.registry.dotted import with_numbers

        return {key: with_numbers(value) for key, value in (self.model_extra or {}).items()}


class Criterion(Part, family="criterion"):
    """A loss between outputs and targets. A subclass of one's own writes `__call__`."""

    config_type = CriterionConfig
    config: Any
    dotted: ClassVar[str] = "module.Class"

    def setup(self) -> None:
        """Called once before the first batch. One of one's own may name what it wants to know of the
        run: what the data publishes, `seed`, `total_steps` …"""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """The mean over the rows of a micro-batch: a scalar with gradient."""
        raise NotImplementedError


class _Functional(Criterion):
    """A function of torch.nn.functional; other keys are its arguments."""

    function: ClassVar[str] = ""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        import torch.nn.functional as F

        loss: Tensor = getattr(F, self.function)(outputs, targets, **self.config.arguments())
        return loss


class CrossEntropy(_Functional):
    """Cross-entropy of class scores (rows, classes, …) and class numbers or probabilities."""

    name = "cross_entropy"
    function = "cross_entropy"


class MSE(_Functional):
    """Mean squared error."""

    name = "mse"
    function = "mse_loss"


class L1(_Functional):
    """Mean absolute error."""

    name = "l1"
    function = "l1_loss"


class SmoothL1(_Functional):
    """Squared near zero, absolute beyond `beta` (Girshick 2015, equation 3)."""

    name = "smooth_l1"
    function = "smooth_l1_loss"


class BCEWithLogits(_Functional):
    """Binary cross-entropy of scores before the sigmoid, with targets of 0 to 1."""

    name = "bce_with_logits"
    function = "binary_cross_entropy_with_logits"


class DottedCriterion(Criterion):
    """Any loss class by its dotted path, such as `torch.nn.HuberLoss`; other keys are its arguments."""

    name = "module.Class"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._made: Any = None

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if self._made is None:
            from arctic_like.registry.dotted import check_arguments
            from arctic_like.registry.named import find_object

            cls = find_object(self.config.type, place="criterion.type")
            arguments = self.config.arguments()
            check_arguments(cls, arguments, place="criterion")
            self._made = cls(**arguments)
        loss: Tensor = self._made(outputs, targets)
        return loss


class MetricConfig(PartConfig):
    """One metric of an evaluation."""

    model_config = ConfigDict(extra="allow")

    type: str = ""
    """`accuracy`, `mae`, `rmse`, `r2`, `confusion_matrix`, or a torchmetrics class by its dotted path."""


class EvaluationMetric(Part, family="metric"):
    """Something that an evaluation measures. `build` returns an object with `update(outputs, targets)`,
    `compute()` and `reset()` that is reduced over ranks: a torchmetrics one."""

    config_type = MetricConfig
    config: Any
    dotted: ClassVar[str] = "module.Class"

    def build(self, *, facts: dict[str, Any]) -> Any:
        """The object. facts: what the data publishes (`num_classes`)."""
        arguments = {**self._filled(facts), **self._stated()}
        return self._class()(**arguments)

    def _class(self) -> Any:
        raise NotImplementedError

    def _filled(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _stated(self) -> dict[str, Any]:
        from arctic_like.registry.dotted import with_numbers

        return {key: with_numbers(value) for key, value in (self.config.model_extra or {}).items()}


class _TorchMetric(EvaluationMetric):
    """A class of torchmetrics; other keys are its arguments."""

    path: ClassVar[str] = ""

    def _class(self) -> Any:
        from arctic_like.errors import RecipeError

        try:
            import torchmetrics  # noqa: F401
        except ImportError:
            raise RecipeError(
                f"the metric {self.name!r} needs torchmetrics: pip install 'arctic-like[metrics]'"
            ) from None
        from arctic_like.registry.named import find_object

        return find_object(self.path, place="metrics")


class _Multiclass(_TorchMetric):
    def _filled(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {"num_classes": facts["num_classes"]} if "num_classes" in facts else {}


class Accuracy(_Multiclass):
    """Share of rows whose highest score is the target's; `num_classes` from the data unless given."""

    name = "accuracy"
    path = "torchmetrics.classification.MulticlassAccuracy"

    def _filled(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {"average": "micro", **super()._filled(facts)}


class ConfusionMatrix(_Multiclass):
    """Counts of (target, prediction); in `trainer.evaluation_values`, as it is no single number."""

    name = "confusion_matrix"
    path = "torchmetrics.classification.MulticlassConfusionMatrix"


class MAE(_TorchMetric):
    """Mean absolute error."""

    name = "mae"
    path = "torchmetrics.MeanAbsoluteError"


class RMSE(_TorchMetric):
    """Root of the mean squared error."""

    name = "rmse"
    path = "torchmetrics.MeanSquaredError"

    def _filled(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {"squared": False}


class R2(_TorchMetric):
    """Share of the targets' variance that is explained."""

    name = "r2"
    path = "torchmetrics.R2Score"


class DottedMetric(EvaluationMetric):
    """Any torchmetrics class by its dotted path; other keys are its arguments."""

    name = "module.Class"

    def _class(self) -> Any:
        from arctic_like.registry.named import find_object

        return find_object(self.config.type, place="metrics")
