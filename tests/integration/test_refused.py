"""Bad recipes through the command itself: exit code 2, one message, no traceback, nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .tools import MODEL, arctic_train, recipe, write_conversations, write_recipe

MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}


def listing(folder: Path) -> list[str]:
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if "cache" not in p.parts
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__config": MAMBA}, ["mamba", "data.pack_samples"]),
        ({"model__dtype": "fp16"}, ["fp16", "model.dtype", "CPU"]),
        ({"data__sources": ["./nowhere.jsonl"]}, ["nowhere.jsonl", "data.sources.0"]),
        (
            {"deepspeed__train_micro_batch_size_per_gpu": 7},
            ["train_micro_batch_size_per_gpu", "micro_batch_size"],
        ),
        ({"data__max_length": 512}, ["512", "256", "max_length"]),
        pytest.param({"data__sources": ["./empty.jsonl"]}, ["empty.jsonl"], marks=pytest.mark.full),
        ({"data__sources": ["./silent.jsonl"]}, ["silent.jsonl", "train"]),
        pytest.param({"data__sources": ["./torn.jsonl"]}, ["torn.jsonl:2"], marks=pytest.mark.full),
        ({"model__config": {**MODEL, "vocab_size": 100}}, ["vocab_size", "100"]),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size", "1 rank"]),
        (
            {"deepspeed__tensor_parallel": {"autotp_size": 2}},
            ["tensor_parallel.autotp_size", "1 rank"],
        ),
        ({"expert_parallel_size": 2}, ["expert_parallel_size"]),
        ({"type": "dpo", "data__type": "dpo"}, ["data.jsonl:1", "`chosen`"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_recipe_is_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=12)
    (tmp_path / "empty.jsonl").write_text("")
    question = {"messages": [{"role": "user", "content": "hello?"}]}
    (tmp_path / "silent.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "torn.jsonl").write_text(data.read_text().splitlines()[0] + '\n{"messages": [{"ro')
    write_recipe(tmp_path / "bad.yaml", recipe(data, **changes))
    before = listing(tmp_path)
    done = arctic_train("bad.yaml", "output_dir=run", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert listing(tmp_path) == before
