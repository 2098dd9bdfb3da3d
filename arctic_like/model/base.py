"""What a recipe's `model:` describes, and the base of everything that builds one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.config.base import PartConfig
from arctic_like.config.values import DType, NameOrPath
from arctic_like.model.transplant import WeightsFromConfig
from arctic_like.registry import Part

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from arctic_like.world import World


class ModelConfig(PartConfig):
    """The recipe's `model:`; a model of one's own derives its config from this."""

    type: str = "huggingface"
    """Which model factory: `huggingface`, `liger`, or a user's own."""

    name_or_path: NameOrPath = ""
    """Hub name or folder of a pretrained model; its tokenizer is the default one."""

    dtype: DType = "bf16"
    """The weights' dtype in training: `bf16`, `fp32` or `fp16`. The same on CPU and GPU."""

    weights_from: WeightsFromConfig | None = None
    """Weights to begin with from another run or file, by name and shape; the others stay as the
    model has them. What was taken and what was not is reported."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is built; None where it does not say."""

    model_type: str | None = None
    max_positions: int | None = None
    """The longest document, in tokens, that the model has positions for."""
    hidden_size: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None


class ModelFactory(Part, family="model"):
    """Builds the model of a run."""

    config_type = ModelConfig
    config: ModelConfig
    shares_sequences: ClassVar[bool] = False
    """Whether its models can be called with a part of each row (`arctic_like.sequence`)."""

    def facts(self) -> ModelFacts:
        """What can be known without building the model. May read the Hub: not for validation."""
        return ModelFacts()

    def build(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        world: World,
        device: str,
        zero_stage: int,
        ds_config: dict[str, Any],
    ) -> nn.Module:
        """The module to train, on no particular device, with its dtype set.

        At ZeRO stage 3 its parameters are partitioned over the ranks while they are made
        (`ds_config` is the finished DeepSpeed dictionary, and the process group must be open).
        Random initial weights depend on `seed` and on names only. The global random generators
        stay as they were.
        Raises RecipeError where it cannot be built as described.
        """
        raise NotImplementedError

    def for_weights(self, *, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> nn.Module:
        """The module on the CPU, to be filled with a checkpoint's weights.

        seed: the run's; weights that checkpoints do not hold, since they are frozen, follow from it."""
        from arctic_like.world import World

        return self.build(
            tokenizer=tokenizer, seed=seed, world=World(), device="cpu", zero_stage=0, ds_config={}
        )
