"""The recipes of ArcticTraining's published projects validate as they are.

The files beside this one have the keys and values of
https://github.com/snowflakedb/ArcticTraining (`projects/`, `examples/`, `news/`, `config/`; for
those that changed over time, the forms of several times), and comments of our own. Left out are
those whose trainer comes with a file of code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arctic_like import load_recipe
from arctic_like.recipe import run_time_refusals

HERE = Path(__file__).parent
RECIPES = sorted(path for pattern in ("*/*.y*ml", "*/*/*.y*ml") for path in HERE.glob(pattern))

REFUSED = {
    "causal_snowflake": {"data.sources.0.sql", "data.sources.0.table_name",
                         "data.sources.0.dataset_uri"},
    "arctic_moe": {"arctic_moe", "expert_parallel_size", "model.arch_variant"},
    "sql_auto_complete": {"data.sample_weighted_loss"},
    "dpo": {"scheduler.learning_rate"},
}  # fmt: skip
"""Folder → what validation says that a run refuses; nothing anywhere else."""


def test_all_of_them_are_looked_at() -> None:
    assert len(RECIPES) == 42


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(HERE)))
def test_it_validates(path: Path) -> None:
    recipe = load_recipe(path)
    again = load_recipe(path).config
    assert recipe.config == again
    folder = path.relative_to(HERE).parts[0]
    assert {problem.place for problem in run_time_refusals(recipe.config)} <= REFUSED.get(
        folder, set()
    )


@pytest.mark.parametrize("folder", REFUSED)
def test_what_a_run_refuses_is_said(folder: str) -> None:
    said = {
        problem.place
        for path in RECIPES
        if path.relative_to(HERE).parts[0] == folder
        for problem in run_time_refusals(load_recipe(path).config)
    }
    assert said == REFUSED[folder]


def test_values_arrive() -> None:
    config = load_recipe(HERE / "sequence-parallelism" / "run-h100-sp16-llama-8b.yml").config
    (source,) = config.data.sources  # type: ignore[attr-defined]
    assert source.type == "huggingface_instruct"
    assert source.split == "train_sft"
    assert source.role_mapping["assistant"] == "messages.role.assistant"
    assert config.data.max_length == 8_000_000  # type: ignore[attr-defined]
    causal = load_recipe(HERE / "causal" / "run-causal-split.yml").config
    (source,) = causal.data.sources  # type: ignore[attr-defined]
    assert (source.type, source.sample_count) == ("huggingface_causal", 100_000)
    assert causal.optimizer.learning_rate == 1e-5  # type: ignore[attr-defined]
    preferences = load_recipe(HERE / "dpo" / "dpo-llama-8b.yaml").config
    (source,) = preferences.data.sources  # type: ignore[attr-defined]
    assert source.split_mapping == {"train": "train_prefs", "eval": "test_prefs"}


def test_nothing_that_they_name_is_needed() -> None:
    """Neither liger, flash-attn, bitsandbytes nor the Hub is asked for, and no torch is loaded."""
    code = (
        "import sys, socket\n"
        "def closed(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = closed\n"
        "from arctic_like import load_recipe\n"
        f"for path in {[str(path) for path in RECIPES]!r}: load_recipe(path)\n"
        "print(*sorted({'torch', 'transformers', 'datasets', 'liger_kernel', 'flash_attn',"
        " 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
