"""The tiny adapter reaches what training all weights reaches, on questions that neither has seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.tools import arctic_train, lines

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_an_adapter_reaches_the_score_of_all_weights(tmp_path: Path) -> None:
    shutil.copytree(RECIPES, tmp_path / "recipes")
    done = arctic_train("recipes/dpo/tiny_sft.yaml", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    scores = {}
    whole = ["model.peft_config=null", "optimizer.learning_rate=3e-4"]
    for name, overrides in (("lora", []), ("full", whole)):
        words = ["recipes/lora/tiny.yaml", f"output_dir={name}", *overrides]
        done = arctic_train(*words, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr
        found = [
            one["eval/exact_match"] for one in lines(tmp_path / name) if "eval/exact_match" in one
        ]
        assert found[0] < 0.1
        scores[name] = found[-1]
    assert scores["lora"] >= scores["full"] - 0.02
    assert scores["full"] > 0.9
    sizes = {
        name: sum(
            p.stat().st_size for p in (tmp_path / name / "exports/step-60").glob("*.safetensors")
        )
        for name in scores
    }
    assert sizes["lora"] < 0.2 * sizes["full"]
