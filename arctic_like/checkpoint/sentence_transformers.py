"""`sentence_transformers`: an embedding model as a folder that sentence-transformers loads.

    modules.json                        the parts by their order: transformer, pooling, normalisation
    sentence_bert_config.json           the longest text, in tokens
    1_Pooling/config.json               how hidden states become a vector
    config_sentence_transformers.json   prefixes by name (`query`, `document`), the similarity
    config.json, *.safetensors, …       the transformers model and its tokenizer

The names and keys are those of sentence-transformers 3 to 5 (`SentenceTransformer.save`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.checkpoint.huggingface import HFCheckpoint, HFCheckpointConfig
from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from arctic_like.checkpoint.retention import Monitored
    from arctic_like.engine.host import HostGroup
    from arctic_like.world import World

_MODES = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
_OTHER_MODES = (
    "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens",
)  # fmt: skip


class SentenceTransformersConfig(HFCheckpointConfig):
    """A folder for sentence-transformers, which transformers loads as well; a run cannot go on from it."""

    type: str = "sentence_transformers"


class SentenceTransformersEngine(HFCheckpoint):
    """Writes an embedding model with its pooling and prefixes, whole or not at all."""

    name = "sentence_transformers"
    config_type = SentenceTransformersConfig

    def save(
        self,
        *,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        world: World,
        host: HostGroup,
        monitored: Monitored | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        query_prefix: str = "",
        passage_prefix: str = "",
        max_length: int | None = None,
    ) -> None:
        """As `HFCheckpoint.save`. The prefixes and the longest text are facts of the data. Collective."""
        host.raise_together(_no_pooling(module) if world.is_main else None)
        prefixes = {"query": query_prefix, "document": passage_prefix}

        def add(folder: Path) -> None:
            _write_parts(module, folder, prefixes=prefixes, max_length=max_length)

        self.write(
            module, tokenizer, directory=directory, host=host, monitored=monitored,
            steps_per_epoch=steps_per_epoch, total_steps=total_steps, add=add,
        )  # fmt: skip


def _no_pooling(module: Any) -> CheckpointError | None:
    if getattr(module, "pooling", None) in _MODES:
        return None
    return CheckpointError(
        f"the sentence_transformers checkpoint engine writes embedding models, not {type(module).__name__}"
        "\n    use type: huggingface, or train with model.type: embedding"
    )


def _write_parts(
    module: Any, folder: Path, *, prefixes: dict[str, str], max_length: int | None
) -> None:
    """What sentence-transformers reads beside the transformers model."""
    package = "sentence_transformers.models"
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{package}.{kind}"}
        for number, (path, kind) in enumerate(parts)
    ]
    modes = {key: name == module.pooling for name, key in _MODES.items()}
    pooling = {
        "word_embedding_dimension": int(module.config.get_text_config().hidden_size),
        **modes, **dict.fromkeys(_OTHER_MODES, False), "include_prompt": True,
    }  # fmt: skip
    whole = {
        "model_type": "SentenceTransformer", "prompts": prefixes, "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", pooling)
    _write(folder / "2_Normalize" / "config.json", {})
    _write(folder / "config_sentence_transformers.json", whole)
    limits = {"max_seq_length": max_length, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", limits)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
