"""A step for which the device has no memory: said in sentences, with what the recipe takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arctic_like.checkpoint.layout import complete_checkpoints
from arctic_like.planning.failure import plan_for_failure
from tests.integration.tools import (
    arctic_train,
    recipe,
    train_lines,
    write_conversations,
    write_recipe,
)

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
CODE = f'''
import torch
from arctic_like import SFTTrainer


class Greedy(SFTTrainer):
    name = "greedy"

    def loss(self, batch):
        if self.global_step == 2 and self.session.micro_batch == 1:
            raise torch.OutOfMemoryError("{SAID}")
        return super().loss(batch)

    def validation_step(self, batch):
        raise torch.OutOfMemoryError("{SAID}")
'''


def write(folder: Path, **changes: Any) -> Path:
    data = write_conversations(folder / "conversations.jsonl")
    (folder / "greedy.py").write_text(CODE)
    content = recipe(
        data, type="greedy", code=str(folder / "greedy.py"), micro_batch_size=2, data__pack_samples=False,
        gradient_accumulation_steps=3, output_dir=str(folder / "run"),
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 1}], **changes,
    )  # fmt: skip
    return write_recipe(folder / "recipe.yaml", content)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    folder = tmp_path_factory.mktemp("memory")
    path = write(folder, train_iters=4)
    done = arctic_train(str(path), cwd=folder)
    return folder, done.returncode, done.stdout + done.stderr


def test_says_where_what_the_allocator_said_and_what_it_takes(
    failed: tuple[Path, int, str],
) -> None:
    _, code, text = failed
    assert code == 1
    assert "Traceback" not in text
    # the third step, the second of three micro-batches
    assert "error: out of memory in the forward of step 3, micro-batch 2 of 3 (2 x " in text
    assert SAID in text
    told = text.partition("error: out of memory")[2]
    assert "run/recipe.yaml on 1 × CPU" in told
    assert "peak of one rank, in " in told
    assert "the activations" in told
    assert "the weights" in told


def test_leaves_the_steps_before_and_nothing_half_written(failed: tuple[Path, int, str]) -> None:
    folder, _, text = failed
    run = folder / "run"
    assert len(train_lines(run)) == 2, text
    result = json.loads((run / "result.json").read_text())
    assert (result["steps"], result["stop_reason"], result["complete"]) == (2, "error", False)
    assert result["error"].startswith("OutOfMemoryError: out of memory in the forward of step 3")
    saved = complete_checkpoints(run / "checkpoints")
    assert saved[-1].name == "step-2"
    assert {entry.name for entry in (run / "checkpoints").iterdir()} <= {
        *(one.name for one in saved), "latest", "best"
    }  # fmt: skip
    assert not [*run.rglob("*.aside"), *run.rglob("*.tmp")]


def test_a_plan_that_fails_or_takes_too_long_is_a_sentence(
    failed: tuple[Path, int, str], tmp_path: Path
) -> None:
    assert plan_for_failure(tmp_path, ranks=1).startswith(
        "no plan could be made: FileNotFoundError"
    )
    cut = plan_for_failure(failed[0] / "run", ranks=8, memory=2.0**34, seconds=0.05)
    assert "cut off after 0 s" in cut
    assert "--gpus 8 --gpu-memory 17179869184" in cut
    (tmp_path / "recipe.yaml").write_text("type: nothing\n")
    assert "no plan could be made (arctic-train plan" in plan_for_failure(tmp_path, ranks=1)


@pytest.mark.full
def test_names_the_cheapest_change_for_the_gpu(failed: tuple[Path, int, str]) -> None:
    """1 GiB is allowed for CUDA; 1 MB is too little for 0.55 MB of weights, gradients and states (16 bytes of
    35,360 numbers) with the activations of 2 x 72 tokens, and enough with those of 1 x 72."""
    page = plan_for_failure(failed[0] / "run", ranks=1, memory=2.0**30 + 1e6, seconds=500)
    assert "first without room: the activations" in page
    assert "cheapest change that fits:\n  micro_batch_size=1\n" in page


@pytest.mark.full
@pytest.mark.parametrize("layers", [1, 2])
def test_of_two_ranks_one_plans(tmp_path: Path, layers: int) -> None:
    path = write(tmp_path, train_iters=4, deepspeed__tensor_parallel={"autotp_size": layers})
    done = arctic_train(str(path), "--num_gpus", "2", cwd=tmp_path)
    text = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in text
    assert " on rank " in text
    assert text.count("peak of one rank, in ") == 1
    assert "run/recipe.yaml on 2 × CPU" in text


@pytest.mark.full
def test_an_evaluation_is_named_as_such(tmp_path: Path) -> None:
    sources = [str(tmp_path / "conversations.jsonl")]
    path = write(tmp_path, train_iters=1, eval_interval=1, data__eval_sources=sources)
    done = arctic_train(str(path), cwd=tmp_path)
    assert done.returncode == 1
    assert "error: out of memory in an evaluation after step 1\n" in done.stderr
