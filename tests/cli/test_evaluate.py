"""`arctic-train evaluate`: what a run measured itself, measured again; closed forms; one rank and two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.cli import evaluate
from arctic_like.cli.evaluate_worker import by_set, measure
from arctic_like.cli.main import main
from arctic_like.errors import RecipeError, RunError
from arctic_like.stop import StopRequest
from tests.integration.tools import (
    arctic_train,
    environment,
    lines,
    recipe,
    write_conversations,
    write_recipe,
)

LINE = '''
import time

import torch
from torch import nn


class Points:
    """y = 2 x for x of 0..n-1, over ten."""

    def __init__(self, size=10, start=0, wait=0.0):
        self.x, self.wait = (torch.arange(start, start + size).float() / 10)[:, None], wait

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(self.wait)
        return {"x": self.x[index], "y": 2 * self.x[index]}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1, 1), 0.5))

    def forward(self, x):
        return x * self.slope
'''


def line_recipe(folder: Path, **data: Any) -> Path:
    (folder / "line.py").write_text(LINE)
    content = {
        "type": "supervised", "code": str(folder / "line.py"), "device": "cpu",
        "model": {"type": "torch", "class": "Line"}, "criterion": "mse", "metrics": {"mae": "mae"},
        "data": {
            "type": "torch", "train": {"class": "Points"},
            "evaluation": {"eval": {"class": "Points"}, "few": {"class": "Points", "kwargs": {"size": 3}}},
            "test": {"test": {"class": "Points", "kwargs": {"start": 20}}}, **data,
        },
        "optimizer": {"type": "torch.optim.SGD", "lr": 0.1}, "scheduler": {"name": "constant"},
        "train_iters": 2, "micro_batch_size": 2, "global_batch_size": 4,
        "logger": {"level": "WARNING"},
    }  # fmt: skip
    return write_recipe(folder / "line.yaml", content)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' part runs in this process."""

    def launched(recipe: Any, _: Any, options: list[str], scratch: Path, *, argv: list[str]) -> int:
        assert not options
        measure(recipe, scratch)
        return 0

    monkeypatch.setattr(evaluate, "_launch", launched)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def check_line(found: dict[str, Any], *, slope: float) -> None:
    """Closed forms of mean squared and absolute error of slope·x against 2·x."""
    for name, rows in ("eval", range(10)), ("eval/few", range(3)), ("test", range(20, 30)):
        errors = [abs(slope - 2) * i / 10 for i in rows]
        its = found["sets"][name]
        assert its["samples"] == len(errors)
        assert its["values"]["loss"] == pytest.approx(sum(e * e for e in errors) / len(errors))
        assert its["values"]["mae"] == pytest.approx(sum(errors) / len(errors))
    assert set(found["sets"]) == {"eval", "eval/few", "test"}


@pytest.mark.full
def test_a_recipe_is_measured_as_it_begins_on_two_ranks(tmp_path: Path) -> None:
    """Three rows over two ranks: one has nothing to do for one of them."""
    done = arctic_train("evaluate", str(line_recipe(tmp_path)), "--num_gpus", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "evaluation.json")
    check_line(found, slope=0.5)
    assert (found["ranks"], found["step"], found["weights"]) == (2, None, "as the recipe begins")
    rows = {row.split()[0]: row.split()[1:] for row in done.stdout.splitlines() if row.strip()}
    assert rows["eval/few"][0] == "3"
    assert float(rows["eval/few"][2]) == pytest.approx(1.5 * 0.1)
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"line.py", "line.yaml", "evaluation.json"}


@pytest.mark.usefixtures("inside")
def test_weights_by_file_and_overrides(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"slope": torch.full((1, 1), 7.0)}, tmp_path / "w.safetensors")
    words = ["evaluate", str(line_recipe(tmp_path)), "micro_batch_size=4"]
    words += [f"--model={tmp_path / 'w.safetensors'}", "--output", str(tmp_path / "deep/out.json")]
    assert main(words) == 0
    found = read(tmp_path / "deep" / "out.json")
    check_line(found, slope=7.0)
    assert found["overrides"] == ["micro_batch_size=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's run with two checkpoints, an export, and evaluations at these steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_conversations(folder / "data.jsonl", count=30)
    content = recipe(
        data, train_iters=4, eval_interval=2, data__train_eval_split=[0.8, 0.2],
        data__test_sources=[str(data)], test_at_end=True, data__pack_samples=False,
        optimizer__learning_rate=3e-2, trackers=[{"type": "test_evaluate_refusing"}],
        code=str(folder / "tracker.py"), train_log_metrics_path=str(folder / "copy.jsonl"),
        logger__output_dir=str(folder / "logs"),
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2},
                    {"type": "huggingface", "save_end_of_training": True}],
    )  # fmt: skip
    (folder / "tracker.py").write_text(
        "from arctic_like.tracking.base import Tracker\n\n\n"
        "class Refusing(Tracker):\n"
        '    """Must not be started again."""\n\n'
        '    name = "test_evaluate_refusing"\n\n'
        "    def start(self, *, output_dir, **values):\n"
        '        assert "evaluation" not in str(output_dir)\n'
    )
    path = write_recipe(folder / "r.yaml", content)
    execute(load_recipe(path), output_dir=folder / "run", resume="", stop=StopRequest())
    return folder / "run"


def contents(run: Path) -> dict[str, bytes]:
    places = [run, run.parent / "logs"]
    files = [p for place in places for p in place.rglob("*") if p.is_file()]
    files += [run.parent / "copy.jsonl"]
    return {str(p): p.read_bytes() for p in files if p.name != "evaluation.json"}


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("step", [2, 4])
def test_a_run_is_measured_as_it_measured_itself(run: Path, step: int) -> None:
    """From a checkpoint and from an export; the run directory gets evaluation.json and nothing else."""
    measured: dict[str, float] = {}
    for line in lines(run):
        if line["step"] == step:
            measured |= {k: v for k, v in line.items() if k.startswith(("eval/", "test/"))}
    assert "eval/loss" in measured
    before = contents(run)
    words = ["--step", "2"] if step == 2 else []
    assert main(["evaluate", str(run), *words]) == 0
    found = read(run / "evaluation.json")
    assert found["step"] == step
    assert found["weights"] == str(
        run / ("checkpoints" if step == 2 else "exports") / f"step-{step}"
    )
    assert found["sets"]["eval"]["values"]["loss"] == pytest.approx(measured["eval/loss"], rel=1e-6)
    test = found["sets"]["test"]
    assert test["samples"] == 30
    if step == 4:
        assert test["values"]["loss"] == pytest.approx(measured["test/loss"], rel=1e-6)
    assert contents(run) == before
    assert not list(run.glob(".evaluation-*"))


def test_an_interrupted_evaluation_leaves_nothing(tmp_path: Path) -> None:
    slow = {"evaluation": {"eval": {"class": "Points", "kwargs": {"size": 1000, "wait": 0.05}}}}
    path = line_recipe(tmp_path, **slow)
    words = [sys.executable, "-m", "arctic_like.cli.main", "evaluate", str(path)]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".evaluation-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert not list(tmp_path.glob(".evaluation-*"))
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.usefixtures("inside")
def test_what_cannot_be_measured_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match="no export or checkpoint of step 3"):
        evaluate.find_weights(run, model=None, step="3")
    with pytest.raises(RecipeError, match="a recipe has no steps"):
        evaluate.find_weights(tmp_path / "r.yaml", model=None, step="3")
    with pytest.raises(RecipeError, match="no such folder"):
        evaluate.find_weights(run, model=str(tmp_path / "absent"), step=None)
    assert main(["evaluate", str(tmp_path)]) == 2
    told = " ".join(capsys.readouterr().err.split())  # lines are cut to the terminal
    assert "neither a run directory nor" in told
    assert main(["evaluate", str(run), "--model"]) == 2
    assert main(["evaluate", str(line_recipe(tmp_path, evaluation={}, test={}))]) == 2
    assert "neither an evaluation set nor a test set" in capsys.readouterr().err
    assert not list(tmp_path.glob(".evaluation-*"))


def test_numbers_by_set() -> None:
    values = {"eval/loss": 1.0, "eval/few/loss": 2.0, "eval/few/top/k": 3.0, "match/all": 4.0}
    assert by_set(values, {"eval": 5, "eval/few": 6}) == {
        "eval": {"samples": 5, "values": {"loss": 1.0}},
        "eval/few": {"samples": 6, "values": {"loss": 2.0, "top/k": 3.0}},
        "match": {"samples": None, "values": {"all": 4.0}},
    }
    with pytest.raises(RunError, match="gave no number"):
        by_set({}, {"eval": 5})
