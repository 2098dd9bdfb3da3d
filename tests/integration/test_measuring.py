"""What evaluations and tests measure: named values, their weights, torchmetrics, on one rank and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .tools import arctic_train, drive, lines, recipe, write_conversations, write_recipe

pytestmark = pytest.mark.full

CODE = '''
import torch
from torch import nn
from torchmetrics import MeanMetric

from arctic_like.trainer.supervised import SupervisedTrainer


class Points:
    """y = 2 x for x of 0..n-1, over ten."""

    def __init__(self, size=10, start=0):
        self.x = (torch.arange(start, start + size).float() / 10)[:, None]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": 2 * self.x[index]}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 1), 0.5))

    def forward(self, x):
        return x * self.slope


class Measuring(SupervisedTrainer):
    name = "test_measuring"

    def configure(self):
        self.seen = MeanMetric()

    def validation_step(self, batch, batch_idx):
        values = super().validation_step(batch)
        large = batch["x"][:, 0] > 0.45
        share = large.float().mean() if len(large) else torch.zeros(())
        self.seen.update(batch["x"][:, 0])
        error = ((self.module(batch["x"]) - batch["y"]).abs()[:, 0] * large).sum()
        return {
            "loss": values,
            "large": share,
            "error_of_large": (error / large.sum().clamp(min=1), large.sum()),
            "x": self.seen,
        }
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring")
    (folder / "code.py").write_text(CODE)
    content = {
        "type": "test_measuring", "code": str(folder / "code.py"), "device": "cpu", "seed": 1,
        "model": {"type": "torch", "class": "Line"}, "criterion": "mse",
        "metrics": {"mae": "mae", "r2": "r2"},
        "data": {
            "type": "torch", "train": {"class": "Points"},
            # three rows over two ranks: one of them has a stand-in
            "evaluation": {"eval": {"class": "Points"}, "few": {"class": "Points", "kwargs": {"size": 3}}},
            "test": {"test": {"class": "Points", "kwargs": {"start": 20}}},
        },
        "optimizer": {"type": "torch.optim.SGD", "lr": 0.0}, "scheduler": {"name": "constant"},
        "train_iters": 2, "micro_batch_size": 2, "global_batch_size": 4, "eval_interval": 1,
        "test_at_end": True, "logger": {"level": "WARNING"},
    }  # fmt: skip
    for ranks in (1, 2):
        path = write_recipe(folder / f"{ranks}.yaml", content)
        drive(
            [{"recipe": str(path), "output_dir": str(path.with_suffix(""))}],
            ranks=ranks,
            folder=folder,
        )
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_named_values_are_means_over_their_own_weights(runs: Path, ranks: int) -> None:
    found: dict[str, Any] = {}
    for line in lines(runs / str(ranks)):
        found |= {k: v for k, v in line.items() if k.startswith(("eval/", "test/"))}
    x = [i / 10 for i in range(10)]
    assert found["eval/loss"] == pytest.approx(sum((1.5 * v) ** 2 for v in x) / 10)
    assert found["eval/mae"] == pytest.approx(sum(1.5 * v for v in x) / 10)
    assert found["eval/large"] == pytest.approx(0.5)
    # 0.5 … 0.9 alone count
    assert found["eval/error_of_large"] == pytest.approx(1.5 * 0.7)
    assert found["eval/x"] == pytest.approx(0.45)
    few = x[:3]
    assert found["eval/few/loss"] == pytest.approx(sum((1.5 * v) ** 2 for v in few) / 3)
    assert found["eval/few/x"] == pytest.approx(0.1)  # a stand-in would make it 0.075
    assert "eval/few/error_of_large" not in found  # nothing to measure it on
    mean = sum(2 * v for v in x) / 10
    residual, total = (
        sum(f(v) ** 2 for v in x) for f in (lambda v: 1.5 * v, lambda v: 2 * v - mean)
    )
    assert found["eval/r2"] == pytest.approx(1 - residual / total)
    assert found["test/mae"] == pytest.approx(sum(1.5 * (v + 2) for v in x) / 10)


def test_an_epoch_leaves_a_record(tmp_path: Path) -> None:
    from arctic_like import load_recipe, run

    data = write_conversations(tmp_path / "data.jsonl", count=4)
    content = recipe(data, train_iters=0, epochs=2, eval_interval="1 epoch", model__dtype="fp32",
                     data__eval_sources=[str(data)], data__pack_samples=False)  # fmt: skip
    result = run(
        load_recipe(write_recipe(tmp_path / "r.yaml", content)), output_dir=tmp_path / "run"
    )
    assert [record["epoch"] for record in result.history] == [1, 2]
    told = lines(tmp_path / "run")
    for record in result.history:
        mine = [line for line in told if line["step"] == record["step"]]
        assert record["eval/loss"] == next(v["eval/loss"] for v in mine if "eval/loss" in v)
        assert record["epoch_train_loss"] == next(
            v["epoch_train_loss"] for v in mine if "epoch_train_loss" in v
        )
    assert result.final_loss == result.history[-1]["eval/loss"]


def test_a_test_set_alone(tmp_path: Path) -> None:
    """`test_only` measures an export and trains nothing."""
    data = write_conversations(tmp_path / "data.jsonl", count=6)
    content = recipe(data, train_iters=2, data__test_sources=[str(data)], test_at_end=True,
                     checkpoint=[{"type": "huggingface", "save_end_of_training": True}])  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", content)
    done = arctic_train(str(path), f"output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained = [line["test/loss"] for line in lines(tmp_path / "run") if "test/loss" in line]
    export = next((tmp_path / "run" / "exports").glob("step-*"))
    measured = [f"model.name_or_path={export}", "model.config=null", "test_only=true"]
    done = arctic_train(
        str(path), f"output_dir={tmp_path / 'again'}", *measured, "checkpoint=[]", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    again = lines(tmp_path / "again")
    assert [line["test/loss"] for line in again] == pytest.approx(trained, rel=1e-6)


def test_weights_from_elsewhere_by_name_and_shape(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.stop import StopRequest

    (tmp_path / "code.py").write_text(CODE)
    save_file(
        {"old.slope": torch.full((1, 1), 7.0), "head": torch.zeros(3)}, tmp_path / "w.safetensors"
    )
    content = {
        "type": "test_measuring", "code": str(tmp_path / "code.py"), "device": "cpu",
        "model": {"type": "torch", "class": "Line",
                  "weights_from": {"path": "w.safetensors", "mapping": {"^old\\.": ""}}},
        "criterion": "mse", "data": {"type": "torch", "train": {"class": "Points"}},
        "train_iters": 1, "logger": {"level": "WARNING"},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }  # fmt: skip
    begun: dict[str, float] = {}

    def look(trainer: Any) -> None:
        for name, value in trainer.learner().engine.named_full_parameters():
            begun[name] = float(value)

    path = write_recipe(tmp_path / "r.yaml", content)
    execute(
        load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest(), inspect=look
    )
    assert begun == {"slope": 7.0}
    content["model"]["weights_from"]["mapping"] = {}
    done = arctic_train(
        str(write_recipe(path, content)), f"output_dir={tmp_path / 'b'}", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "old.slope" in done.stderr
    assert "Traceback" not in done.stderr
