"""Adapters under ZeRO 2 and 3 on two real ranks are those of one process, and resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.errors import CheckpointError
from arctic_like.inference import load_for_inference
from arctic_like.stop import StopRequest
from tests.model.shapes import LLAMA, byte_tokenizer, make

from .tools import drive, recipe, train_lines, without_clocks, write_conversations, write_recipe

pytestmark = pytest.mark.full

STEPS = 6
LORA = {"type": "lora", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
CONFIGS = {
    "lora": {**LORA, "use_rslora": True, "modules_to_save": ["lm_head"]},
    "head": {**LORA, "target_modules": ["q_proj", "down_proj", "lm_head"]},
    "dora": {**LORA, "use_dora": True},
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "grown": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}
SHAPE = {**LLAMA, "tie_word_embeddings": True, "max_position_embeddings": 256}


class Runs:
    """All runs of this file: one launch of two ranks, the others in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_conversations(folder / "data.jsonl", count=50)
        make(SHAPE, seed=11).save_pretrained(folder / "base")
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder / "base")
        tokenizer.add_tokens(["snow", "whale"])
        tokenizer.save_pretrained(folder / "tokens")
        jobs = [self.job(f"{name}-3", name, 3) for name in CONFIGS]
        jobs += [self.job("lora-2", "lora", 2)]
        for stage in (2, 3):
            name = f"resumed-{stage}"
            jobs += [self.job(name, "lora", stage, "exit_iteration=3")]
            jobs += [self.job(name, "lora", stage, resume="latest")]
        jobs += [self.job("moved", "lora", 3, "exit_iteration=3")]
        drive(jobs, ranks=2, folder=folder)
        for name in CONFIGS:
            self.here(self.job(f"{name}-0", name, 0))
        self.here(self.job("moved", "lora", 3, resume="latest"))

    def job(
        self, name: str, kind: str, stage: int, *overrides: str, resume: str = "", **changes: Any
    ) -> dict[str, Any]:
        content = recipe(
            self.data, train_iters=STEPS, micro_batch_size=2, global_batch_size=8,
            data__pack_samples=True, optimizer__loraplus_lr_ratio=4,
            deepspeed__zero_optimization__stage=stage,
            checkpoint=[{"type": "deepspeed", "save_end_of_training": True},
                        {"type": "huggingface", "save_end_of_training": True}],
            **changes,
        )  # fmt: skip
        content["model"] = {
            "name_or_path": str(self.folder / "base"), "dtype": "fp32", "peft_config": CONFIGS[kind],
            **content["model"],
        }  # fmt: skip
        if kind == "grown":
            content["tokenizer"] = {"name_or_path": str(self.folder / "tokens")}
        del content["model"]["config"], content["gradient_accumulation_steps"]
        path = write_recipe(self.folder / f"{kind}-{stage}.yaml", content)
        return {
            "recipe": str(path), "output_dir": str(self.folder / name),
            "overrides": list(overrides), "resume": resume,
        }  # fmt: skip

    def here(self, job: dict[str, Any], inspect: Any = None) -> None:
        execute(
            load_recipe(job["recipe"], job["overrides"]), output_dir=Path(job["output_dir"]),
            resume=job["resume"], stop=StopRequest(), inspect=inspect,
        )  # fmt: skip

    def export(self, name: str) -> Path:
        return self.folder / name / "exports" / f"step-{STEPS}"

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.export(name) / "adapter_model.safetensors")

    def facts(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "facts.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(
    "name", ["lora-2", "lora-3", "head-3", "dora-3", "pissa-3", "grown-3", "moved"]
)
def test_two_ranks_equal_one(runs: Runs, name: str) -> None:
    """Losses, norms, rates and the exported adapter; `moved` was on two ranks and then on one. Adam divides
    gradients that are nearly nothing by themselves: after five steps rounding is 2e-5 of `grown`'s norm."""
    alone = "lora-0" if name == "moved" else f"{name[:-2]}-0"
    lines, expected = train_lines(runs.folder / name), train_lines(runs.folder / alone)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "learning_rate/lora_B"):
            assert line[key] == pytest.approx(other[key], rel=5e-5), (line["step"], key)
        assert line["learning_rate/lora_B"] == pytest.approx(4 * line["learning_rate"])
    assert lines[-1]["loss"] < lines[0]["loss"]
    found, wanted = runs.adapter(name), runs.adapter(alone)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-4, msg=key)
    config = "adapter_config.json"
    assert (runs.export(name) / config).read_text() == (runs.export(alone) / config).read_text()
    base = "base_model.json"
    assert (runs.export(name) / base).read_text() == (runs.export(alone) / base).read_text()
    log = (runs.folder / name / "logs/rank-0.log").read_text()
    assert "full logits" not in log


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_is_the_straight_one_to_the_bit(runs: Runs, stage: int) -> None:
    resumed, straight = f"resumed-{stage}", f"lora-{stage}"
    assert without_clocks(runs.folder / resumed) == without_clocks(runs.folder / straight)
    assert runs.facts(resumed)["final"] == runs.facts(straight)["final"]
    files = [runs.export(name) / "adapter_model.safetensors" for name in (resumed, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["dora-0", "dora-3", "lora-2", "grown-3"])
def test_checkpoints_hold_no_base_and_are_enough(runs: Runs, name: str) -> None:
    """Nothing of the frozen weights lies in them; with the base they are the exported model."""
    checkpoint = runs.folder / name / "checkpoints" / f"step-{STEPS}"
    names = set()
    for path in (checkpoint / "engine").rglob("*model_states.pt"):
        content = torch.load(path, map_location="cpu", weights_only=False)
        names |= set(content["module"])
        assert not content.get("frozen_param_fragments")
    assert names
    assert all(".default" in entry for entry in names)
    kept, _ = load_for_inference(checkpoint)
    exported, _ = load_for_inference(runs.export(name))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(kept(ids).logits, exported(ids).logits, rtol=0, atol=1e-6)


def test_a_checkpoint_over_another_base_is_refused(runs: Runs) -> None:
    runs.here(runs.job("changed", "lora", 0, "exit_iteration=2"))
    base = runs.folder / "base"
    kept = (base / "model.safetensors").read_bytes()
    make(SHAPE, seed=12).save_pretrained(base)
    try:
        with pytest.raises(CheckpointError, match="another base"):
            runs.here(runs.job("changed", "lora", 0, resume="latest"))
        with pytest.raises(CheckpointError, match="another base"):
            load_for_inference(runs.folder / "changed" / "checkpoints" / "step-2")
    finally:
        (base / "model.safetensors").write_bytes(kept)


def test_an_adapter_in_fp32_over_a_base_in_bf16(runs: Runs) -> None:
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def inspect(trainer: Any) -> None:
        for parameter in trainer.module.parameters():
            dtypes[parameter.requires_grad].add(parameter.dtype)

    job = runs.job("mixed", "dora", 2, "model.dtype=bf16", "model.adapter_dtype=fp32")
    runs.here(job, inspect)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    lines, expected = train_lines(runs.folder / "mixed"), train_lines(runs.folder / "dora-0")
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-2)
