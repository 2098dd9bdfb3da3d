"""Models of transformers with a classification head, over texts or over tokens.

They are `AutoModelForSequenceClassification` and `AutoModelForTokenClassification`. Texts go through them
one a row, padded on the right and masked. A text's scores are those that transformers pools, or where the
head gives scores of every token (decoders) those of its last one, which is the same without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from arctic_like.errors import Problem, RecipeError
from arctic_like.model.huggingface import HFModelConfig, HFModelFactory
from arctic_like.model.scoring import ScoringModelFactory, score_every_token

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from arctic_like.world import World

_AUTO = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
}


class ClassifierConfig(HFModelConfig):
    """A model that gives texts, or their tokens, scores of labels."""

    adapter_tasks = ("SEQ_CLS", "TOKEN_CLS")

    type: str = "classifier"

    task: Literal["sequence", "token"] = "sequence"
    """What is classified; the trainer's `task` sets it."""

    multi_label: bool = False
    """Whether a text may have several labels; the trainer's `multi_label` sets it."""

    labels: list[str] = Field(default_factory=list)
    """The labels by their numbers, those of the data unless given; `data.labels` sets it."""

    @property
    def adapter_task(self) -> str:
        """See `HFModelConfig.adapter_task`."""
        return "SEQ_CLS" if self.task == "sequence" else "TOKEN_CLS"


class ClassifierFactory(ScoringModelFactory):
    """A model of transformers that classifies texts or tokens, pretrained or with random weights."""

    name = "classifier"
    told_borders = False
    config_type = ClassifierConfig  # type: ignore[assignment]
    config: ClassifierConfig  # type: ignore[assignment]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.auto_class = _AUTO[config.task]
        self._names = tuple(config.labels)

    def create_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
        """See `HFModelFactory.create_config`; with the labels' names."""
        config = HFModelFactory.create_config(self, tokenizer)
        if self._names:
            config.id2label = dict(enumerate(self._names))
            config.label2id = {name: number for number, name in enumerate(self._names)}
        if self.config.task == "sequence":
            several = self.config.multi_label
            config.problem_type = f"{'multi' if several else 'single'}_label_classification"
        return config

    def build(
        self, *, tokenizer: PreTrainedTokenizerBase, seed: int, world: World, device: str,
        zero_stage: int, ds_config: dict[str, Any], label_names: Sequence[str] = (),
    ) -> nn.Module:  # fmt: skip
        """See `HFModelFactory.build`. label_names: of the data, by their numbers."""
        self._names = tuple(label_names) or self._names
        self._needs_names()
        model: Any = HFModelFactory.build(
            self, tokenizer=tokenizer, seed=seed, world=world, device=device,
            zero_stage=zero_stage, ds_config=ds_config,
        )  # fmt: skip
        if self.config.task == "sequence" and _is_linear(model):
            score_every_token(model)
        ready: nn.Module = model
        return ready

    def for_weights(self, *, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> nn.Module:
        """See `HFModelFactory.for_weights`. Raises RecipeError where the recipe does not name the labels."""
        self._needs_names()
        return super().for_weights(tokenizer=tokenizer, seed=seed)

    def _needs_names(self) -> None:
        if not self._names:
            raise RecipeError(
                Problem(
                    "is not given, and here the data is not read that would say it",
                    place="data.labels",
                    hint="state the labels in the order of the model's outputs",
                )
            )


def _is_linear(model: Any) -> bool:
    """Whether the head is one linear layer, from which scores of every token can be taken."""
    from arctic_like.model.scoring import head_of

    try:
        head_of(model)
    except RecipeError:
        return False
    return True


def text_scores(logits: Tensor, mask: Tensor) -> Tensor:
    """The scores of every text, (texts, labels) in at least float32.

    logits: (texts, labels), or (texts, length, labels) of which those of the last token are taken. mask:
    (texts, length), 1 for tokens, which come first.
    """
    import torch

    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if wide.ndim == 2:
        return wide
    return wide[torch.arange(len(wide), device=wide.device), mask.sum(1) - 1]
