"""The recipes for models that users train: each validates as it is, and runs with a shrunken random model of
its architecture, a tokenizer trained here with its chat template, and data of the shape that it names."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest
from tests.data.tokenizers_for_tests import tokenizer_for
from tests.integration.tools import WORDS, lines, write_conversations, write_recipe
from tests.methods.runs import write_rows

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 16384,
}  # fmt: skip
KINDS = {
    "meta-llama": ("llama", "llama3"), "Qwen": ("qwen3", "qwen3"), "google": ("gemma3_text", "gemma"),
    "mistralai": ("mistral", "mistral"), "HuggingFaceTB": ("llama", "chatml"),
}  # fmt: skip
BILLIONS = {
    "Llama-3.1-8B": 8.03, "Qwen3-8B": 8.19, "Qwen3-4B": 4.02, "Qwen3-0.6B": 0.60,
    "gemma-3-1b": 1.00, "Mistral-7B": 7.25, "SmolLM2-1.7B": 1.71,
}  # fmt: skip


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def header(path: Path) -> str:
    """The comment at the top, in one line."""
    top = path.read_text().split("\n\n")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in top)


@dataclass(frozen=True)
class Room:
    """What a header says of memory: GPUs, GiB of each, and the planned peak with its micro-batch."""

    gpus: int
    memory: int
    peak: float
    micro_batch_size: int


def room_of(path: Path) -> Room:
    said = header(path)
    gpus = re.search(r"--num_gpus (\d+)", said)
    memory = re.search(r"GPUs? of (\d+) GB", said)
    peak = re.search(
        r"Peak by `arctic-train plan` at micro_batch_size (\d+): ([\d.]+) GiB of (\d+); no GPU was at hand "
        r"to compare\.",
        said,
    )
    assert memory, said
    assert peak, said
    assert peak[3] == memory[1]
    return Room(int(gpus[1]) if gpus else 1, int(memory[1]), float(peak[2]), int(peak[1]))


SHOWN = {
    "sft/smollm2-1.7b",
    "lora/mistral-7b",
    "dpo/mistral-7b-lora",
    "reward/qwen3-8b-lora",
    "simpo/gemma-3-1b",
}
"""Those that run in every test; the others in the full matrices."""
FULL_SIZE = [
    path for path in sorted(RECIPES.glob("*/*.yaml")) if "computed, not measured" in header(path)
]


def billions(model: str) -> float:
    return next(size for name, size in BILLIONS.items() if name in model)


def preferences(path: Path, kind: str) -> Path:
    """Pairs, or answers that are wanted or not."""
    with path.open("w") as file:
        for number in range(12):
            prompt = [{"role": "user", "content": f"{number} {WORDS[number]}?"}]
            good, bad = (
                [{"role": "assistant", "content": text}] for text in (WORDS[number], "no " * 3)
            )
            row: dict[str, Any] = {"prompt": prompt, "chosen": good, "rejected": bad}
            if kind == "kto":
                row = {
                    "prompt": prompt,
                    "completion": (good, bad)[number % 2],
                    "label": not number % 2,
                }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full-size")


def test_there_are_some_of_every_kind() -> None:
    assert {path.parent.name for path in FULL_SIZE} >= {
        "sft", "lora", "dpo", "orpo", "simpo", "kto", "distill", "speculator", "reward", "embedding"
    }  # fmt: skip
    assert len(FULL_SIZE) >= 19


@pytest.mark.parametrize("path", FULL_SIZE, ids=name_of)
def test_its_header_says_its_command_and_what_it_needs(path: Path) -> None:
    """Weights and states: 18 bytes a parameter that is trained (bf16; gradient, master weight and two moments
    in fp32), divided among the GPUs; 2 a parameter that is frozen."""
    config = load_recipe(path, []).config
    said = header(path)
    command = re.search(r"arctic-train (recipes/\S+)(?: --num_gpus (\d+))?", said)
    assert command
    assert command[1] == f"recipes/{path.parent.name}/{path.name}"
    size = billions(config.model.name_or_path)
    if getattr(config.model, "peft_config", None):
        gigabytes = [2 * size / 1.0737]
    else:
        gpus = int(command[2] or 1)
        assert (gpus == 1) == (config.deepspeed["zero_optimization"]["stage"] < 3)
        gigabytes = [18 * size / 1.0737 / gpus]
    if path.parent.name == "distill":
        gigabytes.append(2 * billions(config.teacher.model.name_or_path) / 1.0737)
    if (
        path.parent.name == "speculator"
    ):  # embedding and head of Llama's 128,256 tokens, two steps of gates
        heads = (2 * 128256 + 8 * config.model.inner_dim) * config.model.inner_dim / 1e9
        gigabytes = [18 * heads / 1.0737, 2 * size / 1.0737]
    found = [float(number) for number in re.findall(r"([\d.]+) GiB", said)]
    for number in gigabytes:
        assert any(math.isclose(number, one, rel_tol=0.06) for one in found), (number, found)


@pytest.mark.parametrize("path", FULL_SIZE, ids=name_of)
def test_its_gpus_are_used_and_not_filled(path: Path) -> None:
    """By the planned peak, which a full test of tests/planning compares: at least 3 / 8, at most 85 %."""
    room = room_of(path)
    assert room.micro_batch_size == load_recipe(path, []).config.micro_batch_size
    assert 0.375 <= room.peak / room.memory <= 0.85


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=name_of(path), marks=() if name_of(path) in SHOWN else pytest.mark.full
        )
        for path in FULL_SIZE
    ],
)
def test_it_runs_small(folder: Path, path: Path) -> None:
    """Two steps and what is saved at the end: losses are finite, weights are exported."""
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    kind, template = KINDS[content["model"]["name_or_path"].partition("/")[0]]
    place = folder / name_of(path)
    place.mkdir(parents=True)
    tokenizer = tokenizer_for(template)
    tokenizer.save_pretrained(place / "tokenizer")

    def shrink(model: dict[str, Any]) -> None:
        del model["name_or_path"]
        model |= {"config": {**SMALL, "model_type": kind}, "attn_implementation": "sdpa"}

    shrink(content["model"])
    for other in {"teacher", "base"} & content.keys():
        shrink(content[other]["model"])
    if "code" in content:
        content["code"] = str(path.parent / content["code"])
        content["model"]["inner_dim"] = 32
    data = content["data"]
    if data.get("type") in ("dpo", "kto"):
        file = preferences(place / "data.jsonl", data["type"])
    elif data.get("type") == "embedding":
        file = write_rows(
            place / "data.jsonl",
            [{"anchor": f"{number} {word}", "positive": word} for number, word in enumerate(WORDS)],
        )
    else:
        file = write_conversations(place / "data.jsonl", count=40)
    data.pop("train_eval_split", None)
    data |= {"sources": [str(file)], "eval_sources": [str(file)], "max_length": 256,
             "cache_dir": str(folder / "cache")}  # fmt: skip
    content["optimizer"]["type"] = "adamw"
    content |= {
        "tokenizer": {"name_or_path": str(place / "tokenizer")}, "device": "cpu", "train_iters": 2,
        "global_batch_size": 2, "micro_batch_size": 1, "eval_interval": 2,
        "logger": {"level": "WARNING"},
    }  # fmt: skip
    result = execute(
        load_recipe(write_recipe(place / "small.yaml", content)), output_dir=place / "run", resume="",
        stop=StopRequest(),
    )  # fmt: skip
    assert result.steps == 2
    assert math.isfinite(result.final_loss)
    assert any("eval/loss" in line for line in lines(place / "run"))
    (export,) = result.exports
    weights = (
        "adapter_model.safetensors" if path.parent.name == "lora" or "lora" in path.stem else ""
    )
    assert (export / (weights or "model.safetensors")).exists()
