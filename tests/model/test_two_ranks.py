"""Two real processes, ZeRO 0 and 3, against one process: initial weights, loading, exports.

One launch writes everything; the tests compare files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.model.shapes import GPT2, LLAMA, MAMBA, MIXTRAL, TIED, make

pytestmark = pytest.mark.full

CASES = {
    "llama": (TIED, "fp32"),
    "gpt2": (GPT2, "bf16"),
    "mixtral": (MIXTRAL, "fp32"),
    "mamba": (MAMBA, "bf16"),
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks")
    pretrained = folder / "pretrained"
    make(LLAMA, seed=11).model.save_pretrained(pretrained)  # without the head
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus=2",
        f"--master_port={29600 + os.getpid() % 300}",
        str(Path(__file__).with_name("two_ranks.py")),
        str(pretrained),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (folder / "done").exists(), done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_initial_weights_are_those_of_one_process(out: Path, name: str, stage: int) -> None:
    shape, dtype = CASES[name]
    model = make(shape, seed=3, dtype=dtype)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    expected |= {f"buffer:{name}": buffer for name, buffer in model.named_buffers()}
    found = load_file(out / f"{name}-{stage}.safetensors")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_export_at_zero3(out: Path, name: str) -> None:
    model = make(CASES[name][0], seed=3, disable_activation_checkpoint=True).eval()
    loaded = AutoModelForCausalLM.from_pretrained(out / "exports" / name).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_pretrained_weights_at_zero3(out: Path) -> None:
    model = make(name_or_path=str(out / "pretrained"), seed=4)
    found = load_file(out / "pretrained-3.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
