"""What a run does before it has a model: its tokenizer and its data.

`preprocess` and `inspect` do this and nothing more, so whatever they prepare is what a run looks
for. Knows no ranks' collectives and no weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.registry import build
from arctic_like.run_info import supply

if TYPE_CHECKING:
    from arctic_like.data.base import PreparedData
    from arctic_like.run_info import RunInfo


def build_tokenizer(config: Any, info: RunInfo) -> Any:
    """The recipe's tokenizer; None where it has none. Raises RecipeError where it cannot be had."""
    return supply(
        build(config.tokenizer, "tokenizer").build, info,
        model_name_or_path=getattr(config.model, "name_or_path", "") or None,
    )  # fmt: skip


def build_data(config: Any, info: RunInfo, tokenizer: Any) -> PreparedData:
    """The recipe's data, tokenised and packed, or found prepared.

    Of the model only its facts are asked. Raises RecipeError for data that cannot be trained on.
    """
    own_seed = getattr(config.data, "seed", None)
    data: PreparedData = supply(
        build(config.data, "data").build, info, tokenizer=tokenizer,
        max_positions=build(config.model, "model").facts().max_positions,
        seed=info.seed if own_seed is None else own_seed, train_iters=config.train_iters,
    )  # fmt: skip
    if config.test_only and not data.test:
        raise RecipeError(
            Problem("is true, but there is no test set", place="test_only",
                    hint="name one in data.test_sources (data.test for data: {type: torch})")
        )  # fmt: skip
    if not config.test_only and (data.train is None or not len(data.train)):
        raise RecipeError(Problem("holds no sample to train on", place="data.sources"))
    return data
