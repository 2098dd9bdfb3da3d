"""Supervised fine-tuning with an adapter, from a file of conversations on: TRL's losses, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest
from tests.integration.tools import recipe, train_lines, write_conversations, write_recipe
from tests.model.shapes import LLAMA, byte_tokenizer, make

STEPS, MICRO, ACCUMULATED, RATE = 20, 2, 2, 1e-2
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "dora": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True,
        "use_rslora": True, "modules_to_save": ["lm_head"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make({**LLAMA, "max_position_embeddings": 256}, seed=11).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_losses_are_those_of_trl_with_peft(
    base: Path, tmp_path: Path, trl: Any, name: str
) -> None:
    """Steps of two micro-batches with very uneven answers: the mean over the trained tokens of the step."""
    data = write_conversations(tmp_path / "data.jsonl", count=STEPS * MICRO * ACCUMULATED)
    kept: dict[str, Any] = {}

    def keep(trainer: Any) -> None:
        kept["weights"] = {
            name: parameter.detach().clone()
            for name, parameter in trainer.module.named_parameters()
            if parameter.requires_grad
        }
        position, kept["order"] = 0, []
        for _ in range(STEPS):
            batch = trainer.equipment.plan.at(position)
            position = batch.next_position
            kept["order"] += [int(number) for number in batch.samples]

    content = recipe(
        data, data__pack_samples=False, train_iters=STEPS, micro_batch_size=MICRO,
        gradient_accumulation_steps=ACCUMULATED,
        model={"name_or_path": str(base), "dtype": "fp32",
               "peft_config": {"type": "lora", **ADAPTERS[name]}},
        optimizer={"type": "adamw", "learning_rate": RATE, "weight_decay": 0.0},
        scheduler={"type": "huggingface", "name": "constant"},
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    execute(
        load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest(), inspect=keep
    )
    ours = [line["loss"] for line in train_lines(tmp_path / "run")]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    theirs = trl_losses(
        trl, base, [rows[number] for number in kept["order"]], ADAPTERS[name], kept["weights"],
        folder=tmp_path,
    )  # fmt: skip
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


def trl_losses(
    trl: Any, base: Path, rows: list[dict[str, Any]], adapter: dict[str, Any],
    weights: dict[str, torch.Tensor], *, folder: Path,
) -> list[float]:  # fmt: skip
    """The loss of every step of TRL's own trainer, in the order of the rows, from the same first weights."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=ACCUMULATED, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
        train_sampling_strategy="sequential", assistant_only_loss=True, max_length=None,
        report_to="none", save_strategy="no", logging_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **adapter),
    )  # fmt: skip
    own = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    shares: list[float] = []
    compute = trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        shares.append(float(loss.detach()))
        return loss

    trainer.compute_loss = noted
    trainer.train()
    return [sum(shares[at : at + ACCUMULATED]) for at in range(0, len(shares), ACCUMULATED)]
