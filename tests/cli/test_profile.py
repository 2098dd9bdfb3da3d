"""`arctic-train profile`: verdicts over real runs, and what is left on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import (
    arctic_train,
    recipe,
    write_conversations,
    write_recipe,
)

SLOW = '''
import time
from dataclasses import replace
from arctic_like.trainer.sft import SFTTrainer

class Slow(SFTTrainer):
    """Its rows take a tenth of a second each to collate."""
    name = "slow_data"

    def configure(self):
        collate = self.equipment.loader.collate

        def later(samples):
            time.sleep(0.1)
            return collate(samples)

        self.equipment.loader = replace(self.equipment.loader, collate=later)
'''


def profile(content: dict[str, Any], folder: Path, *words: str) -> dict[str, Any]:
    path = write_recipe(folder / "recipe.yaml", content)
    done = arctic_train("profile", str(path), *words, "--output", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    page = (folder / "out/profile.md").read_text()
    assert page in done.stdout
    assert max(map(len, page.splitlines())) <= 80
    assert len(page.splitlines()) <= 60
    found = json.loads((folder / "out/profile.json").read_text())
    assert f"**{found['bottleneck']['kind']}-bound**" in page
    assert sum(found["phases"].values()) == pytest.approx(found["step_time"])
    assert sum(one["share"] for one in found["operations"]) == pytest.approx(1)
    return dict(found)


def test_a_slow_source_of_data_is_named_and_no_run_is_touched(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl")
    (tmp_path / "train.py").write_text(SLOW)
    content = recipe(
        data, type="slow_data", output_dir=str(tmp_path / "run"), eval_interval=1,
        data__train_eval_split=[0.9, 0.1], checkpoint=[{"type": "deepspeed"}], train_iters=2,
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("of another run")
    found = profile(content, tmp_path, "--steps", "3")
    assert found["bottleneck"]["kind"] == "data"
    assert found["phases"]["data"] > 0.1
    assert found["steps"] == 3
    assert "evaluation" not in found["phases"]
    assert "checkpoint" not in found["phases"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]
    assert not (tmp_path / "out/checkpoints").exists()
    assert len(list((tmp_path / "out").glob("trace-rank-0.json.gz"))) == 1
    done = arctic_train("profile", "recipe.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "out is there already" in done.stderr


def test_a_wide_model_computes(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl")
    content = recipe(
        data, micro_batch_size=8, model__config__hidden_size=256, data__pack_samples=True,
        model__config__intermediate_size=1024, optimizer={"type": "sgd", "learning_rate": 0.1},
    )  # fmt: skip
    found = profile(content, tmp_path, "--steps", "2")
    assert found["bottleneck"]["kind"] == "compute"
    assert found["operations"][0]["name"] in ("aten::mm", "aten::addmm", "aten::bmm")
