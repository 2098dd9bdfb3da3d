"""What needs a CUDA device: bf16, ZeRO 2 and 3, fused_adam, packed attention, resuming to the bit.

`make test-gpu` on a machine with a GPU. Small models; each test takes seconds once DeepSpeed's ops are built.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest
from tests.integration.tools import (
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

pytestmark = pytest.mark.gpu

SAVING = [{"type": "deepspeed", "save_every_n_steps": 4}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return write_conversations(tmp_path_factory.mktemp("gpu") / "data.jsonl", count=80)


def train(folder: Path, content: dict[str, Any], *overrides: str, resume: str = "") -> Any:
    content = {**content, "device": "cuda"}
    path = write_recipe(folder / "recipe.yaml", content)
    return execute(
        load_recipe(path, overrides), output_dir=folder / "run", resume=resume, stop=StopRequest()
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in train_lines(folder / "run")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_gives_the_same_numbers_in_fp32(tmp_path: Path, data: Path, stage: int) -> None:
    """Against the fp32 sum over documents of plain cross-entropies on the initial weights."""
    import torch

    expected: dict[str, float] = {}

    def compute(trainer: Any) -> None:
        batch = next(trainer.equipment.loader.steps(0))
        total, count = 0.0, 0
        for micro in batch.micro_batches:
            cuda = {key: value.cuda() for key, value in micro.data.items()}
            with torch.no_grad():
                logits = trainer.logits(cuda)[:, :-1].double()
            targets = cuda["labels"][:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
                )
            )
            count += int((targets != -100).sum())
        expected["loss"] = total / count

    content = recipe(
        data, train_iters=8, micro_batch_size=4, gradient_accumulation_steps=2,
        optimizer__learning_rate=1e-3, deepspeed__zero_optimization__stage=stage, device="cuda",
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    execute(
        load_recipe(path),
        output_dir=tmp_path / "run",
        resume="",
        stop=StopRequest(),
        inspect=compute,
    )
    found = train_lines(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert all(line["grad_norm"] > 0 for line in found)
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "fused_adam"])
def test_bf16_resumes_to_the_bit(tmp_path: Path, data: Path, stage: int, optimizer: str) -> None:
    content = recipe(
        data, train_iters=9, micro_batch_size=2, gradient_accumulation_steps=2, model__dtype="bf16",
        optimizer__type=optimizer, deterministic=True, checkpoint=SAVING,
        deepspeed__zero_optimization__stage=stage,
    )  # fmt: skip
    train(tmp_path / "straight", content)
    train(tmp_path / "cut", content, "exit_iteration=6")
    train(tmp_path / "cut", content, resume="step-4")
    assert without_clocks(tmp_path / "cut/run") == without_clocks(tmp_path / "straight/run")


def test_bf16_learns_as_fp32_does(tmp_path: Path, data: Path) -> None:
    content = recipe(data, train_iters=30, micro_batch_size=8, optimizer__learning_rate=3e-3)
    train(tmp_path / "fp32", content)
    train(tmp_path / "bf16", content, "model.dtype=bf16")
    for one, other in zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), strict=True):
        assert other == pytest.approx(one, rel=0.03)


def test_fp16_recovers_from_overflow_without_losing_a_step(tmp_path: Path, data: Path) -> None:
    """A loss scale that must overflow at first: every step is still done, with its own samples."""
    content = recipe(
        data, train_iters=10, micro_batch_size=4, model__dtype="fp16",
        optimizer__learning_rate=1e-3, deepspeed__zero_optimization__stage=2,
        deepspeed__fp16={"initial_scale_power": 30},
    )  # fmt: skip
    result = train(tmp_path, content)
    found = train_lines(tmp_path / "run")
    assert result.steps == 10
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["samples_seen"] for line in found][:5] == [4, 8, 12, 16, 20]
    assert all(line["grad_norm"] < 1e3 for line in found), "unscaled"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_the_same_documents_alone(
    tmp_path: Path, data: Path, attention: str
) -> None:
    import torch

    content = recipe(data, train_iters=1, model__attn_implementation=attention)
    path = write_recipe(tmp_path / "recipe.yaml", {**content, "device": "cuda"})

    def compare(trainer: Any) -> None:
        trainer.module.eval()
        sample = trainer.equipment.data.train[0]
        ids = torch.as_tensor(sample["input_ids"])[None].cuda()
        positions = torch.as_tensor(sample["position_ids"])[None].cuda()
        with torch.no_grad():
            packed = trainer.logits({"input_ids": ids, "position_ids": positions})[0]
            starts = [*torch.nonzero(positions[0] == 0).flatten().tolist(), ids.shape[1]]
            assert len(starts) > 2
            for start, end in pairwise(starts):
                alone = trainer.module(input_ids=ids[:, start:end], use_cache=False).logits[0]
                assert torch.allclose(packed[start:end], alone, atol=2e-5)

    execute(
        load_recipe(path),
        output_dir=tmp_path / "run",
        resume="",
        stop=StopRequest(),
        inspect=compare,
    )


def test_offload_to_the_host(tmp_path: Path, data: Path) -> None:
    content = recipe(
        data, train_iters=4, micro_batch_size=4, model__dtype="bf16", optimizer__type="cpu_adam",
        deepspeed={"zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
        }},
    )  # fmt: skip
    assert train(tmp_path, content).steps == 4
