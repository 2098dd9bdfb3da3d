"""Data that is not there: every sample as long as the recipe allows, every token trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from arctic_like.data.base import PreparedData, SampleSet
from arctic_like.data.collate import PaddingCollate
from arctic_like.errors import Problem, RecipeError
from arctic_like.planning.rehearsal import Prepared, world_of

if TYPE_CHECKING:
    from arctic_like.data.base import Sample

DOCUMENTS = 4
"""Of a packed row."""
PAIRS, JUDGED = ("dpo",), ("kto",)


class WorstCase(SampleSet):
    """Samples that are all alike: as long as can be, all of them trained."""

    def __init__(self, sample: Sample, weight: int, size: int) -> None:
        self._sample, self._size = sample, size
        self.lengths = np.full(size, len(sample["input_ids"]), dtype=np.int64)
        self.weights = np.full(size, weight, dtype=np.int64)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        return self._sample

    def sample_id(self, index: int) -> str:
        """Nothing that could be looked up."""
        return f"worst case:{index}"


def worst_case(config: Any, *, ranks: int) -> Prepared:
    """A global batch of the longest samples. Raises RecipeError for data whose samples do not follow from the
    recipe."""
    kind, length = config.data.type, getattr(config.data, "max_length", None)
    if kind not in ("sft", "causal", *PAIRS, *JUDGED) or not length:
        raise RecipeError(
            Problem(f"of type {kind} does not say how long a sample is", "data",
                    "leave out --no-data: the plan then prepares the data")
        )  # fmt: skip
    packed = bool(getattr(config.data, "pack_samples", False))
    size = config.resolve_batch(world_of(config, ranks).data_size).global_batch_size
    sample, weight = _sample(kind, int(length), packed=packed)
    train = WorstCase(sample, weight, size)
    data = PreparedData(train, {}, PaddingCollate(0), {"max_length": int(length)})
    return Prepared(_tokenizer(config), data)


def _sample(kind: str, length: int, *, packed: bool) -> tuple[Sample, int]:
    parts = 2 if kind in PAIRS else DOCUMENTS if packed else 1
    total = 2 * length if kind in PAIRS else length
    edges = np.linspace(0, total, parts + 1).astype(int)
    sizes = np.diff(edges)
    labels = np.zeros(total, dtype=np.int64)
    labels[edges[:-1]] = -100
    segments = np.repeat(np.arange(parts), sizes)
    sample = {
        "input_ids": np.zeros(total, dtype=np.int64), "labels": labels,
        "position_ids": np.concatenate([np.arange(size) for size in sizes]),
    }  # fmt: skip
    if kind in (*PAIRS, *JUDGED):
        sample["segment_ids"] = segments
    if kind in JUDGED:
        sample["desirable"] = segments % 2
    weight = {"dpo": parts // 2, "kto": parts}.get(kind, total - parts)
    return sample, weight


def _tokenizer(config: Any) -> Any:
    """The recipe's, or one that has nothing, where it cannot be had: only the vocabulary's size is asked."""
    from pathlib import Path

    from arctic_like.run_info import RunInfo
    from arctic_like.trainer.preparation import build_tokenizer
    from arctic_like.world import World

    info = RunInfo(output_dir=Path(), seed=config.seed, world=World(), device="cpu")
    try:
        return build_tokenizer(config, info)
    except RecipeError:
        return _NoTokenizer()


class _NoTokenizer(SimpleNamespace):
    name_or_path = ""
    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 0
