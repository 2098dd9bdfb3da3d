"""Attention that ranks share, on CUDA: the cores alone, and over NCCL where there are two devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import (
    arctic_train,
    recipe,
    train_lines,
    write_conversations,
    write_recipe,
)
from tests.model.shapes import LLAMA, make

pytestmark = pytest.mark.gpu

MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def devices() -> int:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.cuda.device_count()


@pytest.mark.parametrize("core", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("shape", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_a_core_attends_as_eager_attention_does(shape: dict[str, Any], core: str) -> None:
    """Packed rows in bf16 against eager attention with masks of transformers' own."""
    import torch

    from arctic_like.model import sequence
    from arctic_like.model.isolation import packed_inputs
    from arctic_like.sequence import SequenceGroup, borders_of

    if core != "sdpa":
        pytest.importorskip("flash_attn")
    positions = torch.tensor([[*range(4), *range(9)], [*range(13)]])
    tokens = (positions * 7 + 3) % 262
    plain = make(shape, dtype="bf16", attn_implementation="eager").cuda().eval()
    shared = make(shape, dtype="bf16", attn_implementation=core).cuda().eval()
    sequence.share_attention(shared, SequenceGroup())
    borders = borders_of(positions).cuda()
    with torch.no_grad():
        expected = plain(**packed_inputs(plain, tokens.cuda(), positions.cuda())).logits
        inputs = sequence.shared_inputs(shared, tokens.cuda(), positions.cuda(), borders)
        found = shared(**inputs).logits
    assert float((found - expected).abs().max()) < 3e-2 * float(expected.abs().max())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_devices_train_as_one(tmp_path: Path, devices: int, stage: int) -> None:
    """Six steps in bf16."""
    if devices < 2:
        pytest.skip("one CUDA device")
    data = write_conversations(tmp_path / "data.jsonl", count=40)
    runs = {}
    for ranks in (1, 2):
        content = recipe(
            data, device="cuda", train_iters=6, data__pack_samples=True, model__dtype="bf16",
            deepspeed__zero_optimization__stage=stage, sequence_parallel_size=ranks,
        )  # fmt: skip
        path = write_recipe(tmp_path / f"{ranks}.yaml", content)
        run = tmp_path / f"run-{ranks}"
        done = arctic_train(
            str(path), f"output_dir={run}", "--num_gpus", str(ranks), cwd=tmp_path, DS_ACCELERATOR="cuda"
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        runs[ranks] = train_lines(run)
    for ours, theirs in zip(runs[2], runs[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)
