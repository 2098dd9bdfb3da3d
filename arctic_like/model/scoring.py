"""Models of transformers with a linear head over hidden states: scores of documents and of tokens.

They are transformers' own classes (`AutoModelForSequenceClassification`, `AutoModelForTokenClassification`),
so that an export loads there. Called in training, both give `logits` at every token, (rows, length,
num_labels): transformers would pool one score a row, and a packed row holds several documents.
`document_scores` takes those at documents' last tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanInt
from arctic_like.errors import Problem, RecipeError
from arctic_like.model.huggingface import HFModelConfig, HFModelFactory
from arctic_like.world import World

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class ScoringModelConfig(HFModelConfig):
    """A model that scores documents: the head's output at the last token."""

    adapter_tasks = ("SEQ_CLS",)

    type: str = "scoring"

    num_labels: HumanInt = Field(default=1, ge=1)
    """Scores of a document; 1 for rewards."""


class TokenScoringModelConfig(ScoringModelConfig):
    """A model that scores tokens: the head's output at each of them."""

    adapter_tasks = ("TOKEN_CLS",)

    type: str = "token_scoring"

    num_labels: HumanInt = Field(default=2, ge=1)
    """Scores of a token; 2 for steps that are wrong or right."""


class ScoringModelFactory(HFModelFactory):
    """A model of transformers that scores documents, pretrained or with random weights."""

    name = "scoring"
    config_type = ScoringModelConfig
    config: ScoringModelConfig
    auto_class: str = "AutoModelForSequenceClassification"
    missing_level: ClassVar[str] = "INFO"  # its head is not expected there

    def create_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
        """See `HFModelFactory.create_config`."""
        config = super().create_config(tokenizer)
        config.num_labels = self.config.num_labels
        return config

    def build(
        self, *, tokenizer: PreTrainedTokenizerBase, seed: int, world: World, device: str,
        zero_stage: int, ds_config: dict[str, Any],
    ) -> nn.Module:  # fmt: skip
        """See `HFModelFactory.build`; the model's `logits` are those of every token."""
        model = super().build(
            tokenizer=tokenizer, seed=seed, world=world, device=device, zero_stage=zero_stage,
            ds_config=ds_config,
        )  # fmt: skip
        score_every_token(model)
        return model

    def for_weights(self, *, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> nn.Module:
        """See `HFModelFactory.for_weights`; the model's `logits` are transformers' own."""
        if self.config.adapted:
            return HFModelFactory.build(
                self, tokenizer=tokenizer, seed=seed, world=World(), device="cpu", zero_stage=0,
                ds_config={},
            )  # fmt: skip
        from arctic_like.model.hf_config import set_generation
        from arctic_like.model.loading import unfilled

        model = unfilled(self.create_config(tokenizer), auto=self.auto_class, **self._options())
        model.generation_config = None
        set_generation(model, tokenizer)
        ready: nn.Module = model
        return ready

    def create_model(
        self, config: PretrainedConfig, *, seed: int, world: World, zero: dict[str, Any] | None
    ) -> PreTrainedModel:
        """The model with its initial weights; a head that a checkpoint does not bring is drawn."""
        try:
            model = super().create_model(config, seed=seed, world=world, zero=zero)
        except RuntimeError as error:
            raise RecipeError(self._not_buildable(error)) from error
        model.generation_config = None  # which a model that generates nothing does not have
        return model


class TokenScoringModelFactory(ScoringModelFactory):
    """A model of transformers that scores tokens, pretrained or with random weights."""

    name = "token_scoring"
    config_type = TokenScoringModelConfig
    auto_class = "AutoModelForTokenClassification"

    def create_config(self, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
        """See `ScoringModelFactory.create_config`. Without dropout in front of the head, which
        transformers would otherwise set to 0.1, unless the model's config states one."""
        config = super().create_config(tokenizer)
        if getattr(config, "classifier_dropout", None) is None:
            config.classifier_dropout = 0.0
        return config


def head_of(model: PreTrainedModel) -> nn.Module:
    """The layer that makes scores of hidden states: the one beside the body with `num_labels` outputs; under
    an adapter, what trains it in its place. Raises RecipeError where there is not one such."""
    from torch import nn

    from arctic_like.model.adapters.build import is_adapted

    plain: Any = model.get_base_model() if is_adapted(model) else model
    beside = [part for name, part in plain.named_children() if name != plain.base_model_prefix]
    found: list[nn.Module] = []
    for part in beside:
        layer = getattr(part, "original_module", part)
        if isinstance(layer, nn.Linear) and layer.out_features == model.config.num_labels:
            found.append(part)
    if len(found) != 1:
        raise RecipeError(
            Problem(
                f"{type(model).__name__} has {len(found)} linear layers with "
                f"{model.config.num_labels} outputs beside its body; expected is one, its head",
                place="model",
                hint="name a decoder, such as a llama, qwen3 or gpt2 model",
            )
        )
    return found[0]


def score_every_token(model: PreTrainedModel) -> None:
    """Let the model's `logits` be its head's output at every token. Raises RecipeError as `head_of`.

    The output is taken from the head itself in each forward, behind all hooks that it then has: at ZeRO-3
    those gather the head's weight for the backward.
    """
    taking = _EveryToken(head_of(model))
    model.register_forward_pre_hook(taking.begin)
    model.register_forward_hook(taking.end)


class _EveryToken:
    """Hooks of a model that put its head's output in the place of its pooled logits."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self._handle: Any = None
        self._scores: list[Tensor] = []
        self._lent_padding = False

    def begin(self, model: Any, _: Any) -> None:
        self._let_go()  # of a forward that failed
        self._handle = self.head.register_forward_hook(self._keep)
        text = model.config.get_text_config()
        if text.pad_token_id is None:
            # else transformers refuses to pool several rows; what it pools is not looked at
            text.pad_token_id, self._lent_padding = -1, True

    def end(self, model: Any, _: Any, output: Any) -> Any:
        if self._lent_padding:
            model.config.get_text_config().pad_token_id, self._lent_padding = None, False
        (output.logits,) = self._scores
        self._let_go()
        return output

    def _keep(self, _: Any, __: Any, output: Tensor) -> None:
        self._scores.append(output)

    def _let_go(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._scores = None, []


def document_scores(scores: Tensor, segment_ids: Tensor, *, documents: int) -> Tensor:
    """The scores at the last token of every document, (documents, num_labels) in at least float32.

    scores: (rows, length, num_labels). segment_ids: (rows, length) int64, the document's number in its row,
    -1 in padding. documents: how many the batch has; they are counted row by row.
    """
    import torch
    import torch.nn.functional as F

    following = F.pad(segment_ids[:, 1:], (0, 1), value=-1)
    ends = ((segment_ids >= 0) & (segment_ids != following)).flatten().cumsum(0)
    wanted = torch.arange(1, documents + 1, device=ends.device)
    # the k-th end is the first place by which k were counted; the host does not wait for the device
    places = torch.searchsorted(ends, wanted)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return wide.flatten(0, 1)[places]
