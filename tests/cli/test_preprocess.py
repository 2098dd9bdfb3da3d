"""`arctic-train preprocess`: what it makes is what a run looks for, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from arctic_like import load_recipe, run
from arctic_like.cli import preparation
from arctic_like.cli.main import main
from arctic_like.errors import RecipeError
from tests.integration.tools import environment, recipe, write_conversations, write_recipe

ROWS = """
import os, pathlib, sys, time

def talks():
    for n in range(40):
        if n == 20 and os.environ.get("HANGS"):
            pathlib.Path(os.environ["HANGS"]).touch()
            time.sleep(120)
        yield {"messages": [{"role": "user", "content": str(n)},
                            {"role": "assistant", "content": "a" * n}]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_conversations(tmp_path / "train.jsonl", count=30)
    held = write_conversations(tmp_path / "held.jsonl", count=8, seed=1)
    content = recipe(
        data, data__eval_sources=[str(held)], train_iters=1, data__train_eval_split=[1, 0]
    )
    del content["data"]["train_eval_split"]
    write_recipe(tmp_path / "r.yaml", content)
    return tmp_path


def entries(folder: Path) -> dict[str, int]:
    """Complete entries of the cache with the times at which they were made."""
    markers = sorted((folder / "cache").glob("*/*/complete.json"))
    return {str(path.parent.relative_to(folder)): path.stat().st_mtime_ns for path in markers}


def test_a_run_finds_what_was_prepared(folder, capsys):
    assert main(["preprocess", "r.yaml"]) == 0
    out = capsys.readouterr().out
    made = entries(folder)
    assert len(made) == 4
    assert out.startswith("train: 30 documents → ")
    assert f"in {folder / 'cache'}:" in out
    assert out.count("  made   ") == 4
    assert "/train.jsonl" in out
    listed = out[out.index(f"in {folder}") :].splitlines()
    assert all(len(line) <= 80 for line in listed if str(folder) not in line)
    assert not (folder / "runs").exists()

    assert main(["preprocess", "r.yaml"]) == 0
    assert capsys.readouterr().out.count("  found  ") == 4
    overrides = ["data.fail_on_missing_cache=true", f"output_dir={folder / 'run'}"]
    assert run(load_recipe("r.yaml", overrides)).steps == 1
    assert entries(folder) == made

    # another length: tokenised as before, packed anew
    assert main(["preprocess", "r.yaml", "data.max_length=64"]) == 0
    out = capsys.readouterr().out
    assert (out.count("  found  "), out.count("  made   ")) == (2, 2)
    with pytest.raises(RecipeError, match="arctic-train preprocess"):
        run(load_recipe("r.yaml", [*overrides, "data.max_length=48", "overwrite=true"]))


def test_the_seed_that_holds_rows_out_is_the_runs(folder):
    words = ["data.eval_sources={}", "data.train_eval_split=[0.8, 0.2]", "seed=5"]
    assert main(["preprocess", "r.yaml", *words]) == 0
    made = entries(folder)
    overrides = [*words, "data.fail_on_missing_cache=true", f"output_dir={folder / 'run'}"]
    assert run(load_recipe("r.yaml", overrides)).steps == 1
    assert entries(folder) == made


def test_a_recipe_that_refuses_a_missing_cache_is_prepared(folder):
    assert main(["preprocess", "r.yaml", "data.fail_on_missing_cache=true"]) == 0
    assert len(entries(folder)) == 4


def test_verify_is_said_to_the_data(folder):
    assert preparation.load("r.yaml", [], verify=True).config.data.verify_content is True
    assert preparation.load("r.yaml", []).config.data.verify_content is False


def test_neither_deepspeed_nor_weights_are_needed(folder):
    # a model of the Hub that is nothing but its config
    (folder / "model").mkdir()
    config = {"model_type": "llama", "max_position_embeddings": 48, "hidden_size": 8,
              "num_attention_heads": 2, "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config))
    content = yaml.safe_load(Path("r.yaml").read_text())
    content["model"] = {"name_or_path": str(folder / "model")}
    del content["data"]["max_length"]
    write_recipe(folder / "hub.yaml", content)
    code = (
        "import sys; from arctic_like.cli.main import main; code = main(['preprocess', 'hub.yaml']); "
        "print(code, 'deepspeed' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment())  # fmt: skip
    assert done.stderr.split() == ["0", "False"], done.stderr
    assert "of up to 48 tokens" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.sources=[gone.jsonl]"], ["gone.jsonl"]),
        (["data.max_length=1000"], ["data.max_length", "256"]),
        (["data.fuse_positions_prob=0.5"], ["data.fuse_positions_prob"]),
        (["data.type=torch", "data.sources=[]"], ["data"]),
        (["nothing=1"], ["nothing"]),
    ],
)
def test_what_cannot_be_prepared(folder, capsys, words, expected):
    assert main(["preprocess", "r.yaml", *words]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in err
    for word in expected:
        assert word in err
    assert entries(folder) == {}


def test_what_a_run_would_refuse_is_a_warning(folder, capsys):
    assert main(["preprocess", "r.yaml", "expert_parallel_size=2"]) == 0
    assert "warning: expert_parallel_size" in capsys.readouterr().err


def test_data_of_ones_own_keeps_nothing(folder, capsys):
    (folder / "mine.py").write_text(
        "import torch\nclass Ones(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n    def __getitem__(self, i): return torch.ones(2)\n"
    )
    content = {"type": "supervised", "code": "mine.py", "tokenizer": {"type": "none"},
               "data": {"type": "torch", "train": {"class": "Ones"}},
               "model": {"type": "torch", "class": "torch.nn.Linear"},
               "criterion": "cross_entropy", "optimizer": {"type": "adamw"}}  # fmt: skip
    write_recipe(folder / "mine.yaml", content)
    assert main(["preprocess", "mine.yaml"]) == 0, capsys.readouterr().err
    assert "nothing of this data is kept" in capsys.readouterr().out
    assert main(["inspect", "mine.yaml"]) == 2
    assert "data.type" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full)],
)
def test_stopped_in_the_middle(folder, asked, code):
    (folder / "rows.py").write_text(ROWS)
    mark = folder / "hangs"
    words = ["preprocess", "r.yaml", 'data.sources=[{type: python, name_or_path: "rows.py:talks"}]']
    command = [sys.executable, "-m", "arctic_like", *words]
    process = subprocess.Popen(
        command, env=environment(HANGS=str(mark)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert mark.exists(), process.communicate(timeout=60)
    os.kill(process.pid, asked)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    if asked == signal.SIGINT:
        assert "the same command goes on" in err
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: 40 documents" in done.stdout
