"""What `preprocess` and `inspect` share: a recipe's tokenizer and data, without a model or ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.cli.show import show_problems
from arctic_like.cli.startup import without_pydantic_plugins
from arctic_like.errors import TERMINATED, RecipeError

if TYPE_CHECKING:
    from arctic_like.data.base import PreparedData
    from arctic_like.recipe import Recipe


@dataclass(frozen=True)
class Preparation:
    """What came of it. there: the cache's entries that were complete before."""

    recipe: Recipe
    tokenizer: Any
    data: PreparedData
    there: set[Path]


def load(path: str, overrides: list[str], *, verify: bool = False) -> Recipe:
    """A recipe whose data may be prepared, whatever it says of a missing cache.

    Warns of what has no effect and of what a run would refuse. Raises RecipeError for data that
    cannot be.
    """
    words = [*overrides, *(["data.verify_content=true"] if verify else [])]
    with without_pydantic_plugins():
        from arctic_like.recipe import load_recipe, run_time_refusals, warnings

        recipe = load_recipe(path, words)
        if getattr(recipe.config.data, "fail_on_missing_cache", False):
            # said to a run, which is to find what is prepared here
            recipe = load_recipe(path, [*words, "data.fail_on_missing_cache=false"])
    refused = run_time_refusals(recipe.config)
    ours = [one for one in refused if one.place.partition(".")[0] in ("data", "tokenizer")]
    others = [one for one in refused if one not in ours]
    others += getattr(recipe.trainer, "refuse", list)()
    show_problems([*warnings(recipe.config), *others], kind="warning")
    ours += _data_problems(recipe)
    if ours:
        raise RecipeError(ours)
    return recipe


def _data_problems(recipe: Recipe) -> list[Any]:
    from arctic_like.registry import build

    problems = getattr(build(recipe.config.data, "data"), "problems", None)
    return [] if problems is None else list(problems())


def prepare(recipe: Recipe, *, level: str) -> Preparation:
    """Prepare all sets, or find them prepared, in this process.

    level: the least severe messages to show. Raises RecipeError and RunError.
    """
    from arctic_like.api import default_output_dir
    from arctic_like.data import cache, inventory
    from arctic_like.logs import close_logging, setup_logging
    from arctic_like.run_info import RunInfo
    from arctic_like.trainer.preparation import build_data, build_tokenizer
    from arctic_like.world import World

    config = recipe.config
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    there = inventory.complete(cache.root(getattr(config.data, "cache_dir", None)))
    info = RunInfo(
        output_dir=default_output_dir(recipe), seed=config.seed, world=World(), device="cpu",
        epochs=config.epochs, micro_batch_size=config.rows,
    )  # fmt: skip
    setup_logging(level=level)
    try:
        with _ends_when_terminated():
            tokenizer = build_tokenizer(config, info)
            data = build_data(config, info, tokenizer)
    finally:
        close_logging()
    return Preparation(recipe, tokenizer, data, there)


@contextmanager
def _ends_when_terminated() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that what was begun is left in order."""

    def end(*_: Any) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
