"""Models of transformers without a head: a vector of every text, from its tokens' last hidden states.

Texts go through the model one a row, padded on the right and masked, so that encoders and decoders alike
see each by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from arctic_like.config.values import HumanFloat
from arctic_like.model.huggingface import HFModelConfig, HFModelFactory
from arctic_like.model.scoring import ScoringModelFactory

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.world import World

Pooling = Literal["mean", "last", "cls"]


class EmbeddingModelConfig(HFModelConfig):
    """A model that makes vectors of texts."""

    adapter_tasks = ("FEATURE_EXTRACTION",)

    type: str = "embedding"

    pooling: Pooling = "mean"
    """What of a text's hidden states is its vector: their `mean`, that of the `last` token (for decoders),
    or of the first (`cls`)."""

    learned_temperature: HumanFloat | None = Field(default=None, gt=0)
    """Where a temperature begins that is trained with the model; `learn_temperature` sets it."""


class EmbeddingModelFactory(ScoringModelFactory):
    """A model of transformers that makes vectors of texts, pretrained or with random weights."""

    name = "embedding"
    told_borders = False
    config_type = EmbeddingModelConfig  # type: ignore[assignment]
    config: EmbeddingModelConfig  # type: ignore[assignment]
    auto_class: str = "AutoModel"

    def create_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
        """See `HFModelFactory.create_config`."""
        return HFModelFactory.create_config(self, tokenizer)

    def build(
        self, *, tokenizer: PreTrainedTokenizerBase, seed: int, world: World, device: str,
        zero_stage: int, ds_config: dict[str, Any],
    ) -> nn.Module:  # fmt: skip
        """See `HFModelFactory.build`; a learned temperature is the model's `temperature`."""
        model = HFModelFactory.build(
            self, tokenizer=tokenizer, seed=seed, world=world, device=device,
            zero_stage=zero_stage, ds_config=ds_config,
        )  # fmt: skip
        return self._completed(model)

    def for_weights(self, *, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> nn.Module:
        """See `HFModelFactory.for_weights`."""
        model: Any = super().for_weights(tokenizer=tokenizer, seed=seed)
        without_pooler(model)
        return self._completed(model)

    def create_model(
        self, config: PretrainedConfig, *, seed: int, world: World, zero: dict[str, Any] | None
    ) -> PreTrainedModel:
        """The model with its initial weights, and without a pooler, which would not be trained."""
        model = super().create_model(config, seed=seed, world=world, zero=zero)
        without_pooler(model)
        return model

    def _completed(self, model: Any) -> nn.Module:
        model.pooling = self.config.pooling
        if self.config.learned_temperature is not None:
            add_temperature(model, self.config.learned_temperature)
        completed: nn.Module = model
        return completed


def without_pooler(model: PreTrainedModel) -> None:
    """Take away the layer that some encoders have behind the first token: their classifiers' part."""
    from torch import nn

    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None


def add_temperature(model: Any, temperature: float) -> None:
    """Give a model a trained parameter `temperature.log_scale`, (1,) float32 or the model's dtype, the
    logarithm of 1 / temperature (Radford et al. 2021, section 2.3); outputs bring it as `log_scale`.

    It is read inside the model's forward, where ZeRO-3 gathers it.
    """
    import torch
    from torch import nn

    class Temperature(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            start = torch.full((1,), -math.log(temperature), dtype=dtype)
            self.log_scale = nn.Parameter(start)

        def forward(self) -> Tensor:
            return self.log_scale + 0  # at ZeRO-3 the parameter itself is gone afterwards

    model.temperature = Temperature(next(model.parameters()).dtype)

    def bring(module: Any, _: Any, output: Any) -> Any:
        output.log_scale = module.temperature()
        return output

    model.register_forward_hook(bring)


@dataclass(frozen=True)
class TextRows:
    """Where the texts of a batch stand. index: (texts, longest) int64, into the flattened batch, behind a
    text its last token. mask: the same shape, int64, 1 for tokens."""

    index: Tensor
    mask: Tensor


def text_rows(segment_ids: Tensor) -> TextRows:
    """The texts of a batch, row by row, each as a row of its own. segment_ids: (rows, length) int64, the
    text's number in its row, -1 in padding. To be asked of the batch on the host."""
    import torch
    import torch.nn.functional as F

    before = F.pad(segment_ids[:, :-1], (1, 0), value=-1)
    behind = F.pad(segment_ids[:, 1:], (0, 1), value=-1)
    there = segment_ids >= 0
    begins = (there & (segment_ids != before)).flatten().nonzero().squeeze(1)
    ends = (there & (segment_ids != behind)).flatten().nonzero().squeeze(1)
    lengths = ends - begins + 1
    within = torch.arange(int(lengths.max()))
    index = torch.minimum(begins[:, None] + within, ends[:, None])
    return TextRows(index, (within < lengths[:, None]).long())


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """The vector of every text, (texts, hidden size) in at least float32.

    hidden: (texts, longest, hidden size). mask: (texts, longest), 1 for tokens, which come first.
    """
    import torch

    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if pooling == "cls":
        return wide[:, 0]
    if pooling == "last":
        last = mask.sum(1) - 1
        return wide[torch.arange(len(wide), device=wide.device), last]
    weights = mask.to(wide)[:, :, None]
    return (wide * weights).sum(1) / weights.sum(1)
