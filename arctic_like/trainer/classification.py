"""`classification`: labels of texts, or of their words."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanFloat
from arctic_like.errors import Problem, RecipeError
from arctic_like.loss import Loss
from arctic_like.registry import build
from arctic_like.registry.choice import Choice
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.preference_config import raise_problems

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100


class ClassificationConfig(TrainerConfig):
    """A recipe of `type: classification`."""

    type: str = "classification"
    """The trainer: labels of texts or of their words."""

    task: Literal["sequence", "token"] = "sequence"
    """What has a label: a `sequence`, or every `token` at which a word begins."""

    multi_label: bool = False
    """A text has any number of labels, each there or not."""

    class_weights: dict[str, Annotated[HumanFloat, Field(ge=0)]] = Field(default_factory=dict)
    """Label → how much it counts in the loss, 1 for others; with `multi_label`, its presence."""

    metrics: dict[str, Annotated[PartConfig, Choice("metric", short="type")]] = Field(
        default_factory=dict
    )
    """What evaluations measure beside loss, accuracy, F1 and confusion matrix: name → metric."""

    @model_validator(mode="after")
    def _of_data_and_model(self) -> Self:
        """Data and model follow the trainer: not stated, so a recipe that is written out does not say it."""
        data: Any = self.data
        if self.task == "token" and self.multi_label:
            problem = Problem(
                "is true, but a word has one label",
                "multi_label",
                "leave it out, or task: sequence",
            )
            raise_problems(type(self).__name__, [problem])
        wanted = {"task": self.task, "multi_label": self.multi_label}
        for place, more in (("data", {}), ("model", {"labels": getattr(data, "labels", [])})):
            self._follow(place, {**wanted, **more})
        return self

    def _follow(self, place: str, wanted: dict[str, Any]) -> None:
        part: Any = getattr(self, place)
        changed = {k: v for k, v in wanted.items() if getattr(part, k, v) != v}
        for key, value in changed.items():
            if part.given(key):
                source = "data.labels" if key == "labels" else key
                problem = Problem(
                    f"is {getattr(part, key)}, but {source} is {value}", f"{place}.{key}",
                    f"leave it out: {source} says it",
                )  # fmt: skip
                raise_problems(type(self).__name__, [problem])
        if changed:
            made = part.replace(**changed)
            made.model_fields_set.difference_update(changed)
            self.__dict__[place] = made


class ClassificationTrainer(Trainer):
    """Cross-entropy of one label, or binary cross-entropy of each of several.

    One label: Σ w(label) · loss / Σ w(label) over all texts (words) of the global batch, w being
    `class_weights`. Several: the mean over texts and labels, w on what is there.
    """

    name = "classification"
    config_type: ClassVar[type[TrainerConfig]] = ClassificationConfig
    data_factory_type: ClassVar[Any] = ("classification",)
    model_factory_type: ClassVar[Any] = ("classifier",)
    weight_unit: ClassVar[str] = "labels"

    def configure(self) -> None:
        """Raises RecipeError for weights of labels that there are not."""
        unknown = [name for name in self.config.class_weights if name not in self.label_names]
        if unknown:
            raise RecipeError(
                Problem(
                    f"names {', '.join(map(repr, unknown))}; the labels are "
                    f"{', '.join(map(repr, self.label_names))}"[:400],
                    "class_weights",
                )
            )

    @cached_property
    def label_names(self) -> list[str]:
        """The labels by their numbers."""
        found = dict(self.module.config.id2label)  # type: ignore[union-attr, arg-type]
        return [found[number] for number in sorted(found)]

    @cached_property
    def _weights(self) -> Tensor:
        """(labels,) float64, on the host."""
        import torch

        stated = self.config.class_weights
        return torch.tensor([stated.get(n, 1.0) for n in self.label_names], dtype=torch.float64)

    def weight(self, batch: dict[str, Tensor]) -> float:
        """The weights of all labels; with several labels a text, the number of texts."""
        if self.config.multi_label:
            return float(len(batch["input_ids"]))
        targets = self.targets(batch)
        return float(self._weights[targets[targets != IGNORE]].sum())

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Numbers of labels of a batch on the host: (texts,) int64, (texts, length) of words with -100 where
        there is none, or (texts, labels) 0 and 1 where there may be several."""
        import torch

        if self.config.task == "token":
            return batch["labels"]
        columns = [batch[name][:, 0] for name in sorted(
            (name for name in batch if name.startswith("classes_")),
            key=lambda name: int(name.rpartition("_")[2]),
        )]  # fmt: skip
        bits = torch.stack(columns, dim=1)[:, :, None] >> torch.arange(62) & 1
        there = bits.flatten(1)[:, : len(self.label_names)]
        return there if self.config.multi_label else there.argmax(1)

    def to_device(self, batch: Any) -> Any:
        """`input_ids`, `attention_mask` and `targets` on the device."""
        mask = (batch["segment_ids"] >= 0).long()
        return super().to_device({
            "input_ids": batch["input_ids"], "attention_mask": mask, "targets": self.targets(batch),
        })  # fmt: skip

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """(texts, labels) or (texts, length, labels), in at least float32."""
        import torch

        from arctic_like.model.classifier import text_scores

        mask = batch["attention_mask"]
        logits: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=mask).logits
        if self.config.task == "sequence":
            return text_scores(logits, mask)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """The weighted mean, with how many labels are the highest scored one (or on the right side of 0)."""
        return self._compared(self.scores(batch), batch["targets"])

    def _compared(self, scores: Tensor, targets: Tensor) -> Loss:
        import torch.nn.functional as F

        weights = self._weights.to(scores)
        if self.config.multi_label:
            mean = F.binary_cross_entropy_with_logits(
                scores, targets.to(scores), pos_weight=weights
            )
            right = ((scores.detach() > 0) == targets.bool()).double().mean()
            return Loss(mean, values={"accuracy": right})
        scores, targets = _labelled(scores, targets)
        total = F.cross_entropy(scores, targets, weight=weights, reduction="sum")
        over = weights[targets].sum()
        hits = (scores.detach().argmax(-1) == targets).sum()
        # a stand-in may have no label, or only such as count nothing
        mean = total / over.clamp(min=1e-30)
        return Loss(mean, groups={"accuracy": (hits, hits.new_tensor(len(targets)))})

    def get_val_metrics(self) -> dict[str, Any]:
        """Macro F1 and the confusion matrix (which is no number: `evaluation_values`), with the recipe's."""
        count = len(self.label_names)
        kind, key = ("Multilabel", "num_labels") if self.config.multi_label else (
            "Multiclass", "num_classes",
        )  # fmt: skip
        made = {
            "f1": _torchmetric(f"{kind}F1Score", average="macro", **{key: count}),
            "confusion_matrix": _torchmetric(f"{kind}ConfusionMatrix", **{key: count}),
        }
        return made | {
            name: build(config, "metric").build(facts={**self.facts, key: count})
            for name, config in self.config.metrics.items()
        }

    def validation_step(self, batch: Any) -> Any:
        """The loss; the metrics are updated."""
        scores, targets = self.scores(batch), batch["targets"]
        found = self._compared(scores, targets)
        if not self.config.multi_label:
            scores, targets = _labelled(scores, targets)
        if len(targets):
            for metric in self.val_metrics.values():
                metric.update(scores, targets)
        return found


def _labelled(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and numbers of those that have a label, (…, labels) and (…)."""
    if targets.ndim == 1:
        return scores, targets
    known = targets != IGNORE
    return scores[known], targets[known]


def _torchmetric(name: str, **arguments: Any) -> Any:
    try:
        import torchmetrics.classification
    except ImportError:
        raise RecipeError(
            "type: classification measures with torchmetrics: pip install 'arctic-like[metrics]'"
        ) from None
    return getattr(torchmetrics.classification, name)(**arguments)
