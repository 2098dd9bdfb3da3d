"""A tiny recipe, ways to run it on one process or several, and ways to look at what it left."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from arctic_like.trainer.phases import OUTSIDE, STEP

PORTS: list[int] = []
"""Of every launch of `drive`: what shared names of its ranks would hold."""
RATES = {f"{unit}_per_second" for unit in ("tokens", "samples", "pairs", "answers")}
CLOCKS = {"step_time"} | RATES | {f"time/{phase}" for phase in (*STEP, *OUTSIDE)}
WORDS = [
    "ice",
    "snow",
    "frost",
    "floe",
    "berg",
    "polar",
    "night",
    "aurora",
    "seal",
    "whale",
    "tundra",
    "drift",
]

MODEL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def write_conversations(path: Path, *, count: int = 60, seed: int = 0) -> Path:
    """Conversations whose answers differ in length by a factor of up to forty."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            answer = " ".join(draw.choices(WORDS, k=1 if number % 2 else draw.randint(2, 12)))
            turns = [
                {"role": "user", "content": f"{number} {draw.choice(WORDS)}?"},
                {"role": "assistant", "content": answer[: 1 + draw.randint(0, 70)]},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def recipe(data: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe as a map; `changes` use `__` for nesting: `data__max_length=64`."""
    base: dict[str, Any] = {
        "type": "sft",
        "seed": 7,
        "device": "cpu",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "train_iters": 4,
        "model": {"config": dict(MODEL), "dtype": "fp32", "disable_activation_checkpoint": True},
        "tokenizer": {"type": "byte"},
        "data": {
            "sources": [str(data)],
            "max_length": 128,
            "cache_dir": str(data.parent / "cache"),
        },
        "optimizer": {"type": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1},
        "scheduler": {"type": "huggingface", "name": "cosine", "warmup_ratio": 0.1},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "logger": {"level": "WARNING"},
    }
    for key, value in changes.items():
        place = base
        *parents, last = key.split("__")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return copy.deepcopy(base)


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The train lines of a run."""
    return [line for line in lines(run) if "learning_rate" in line]


def without_clocks(run: Path) -> list[dict[str, Any]]:
    """All lines, their clocks left out; what a resumed run must repeat to the bit."""
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines(run)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**extra: str) -> dict[str, str]:
    """This process's environment for a child: one thread, CPU, no leftovers of a launcher."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {k: v for k, v in os.environ.items() if k not in launcher}
    return {**clean, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **extra}


def drive(jobs: list[dict[str, Any]], *, ranks: int, folder: Path, timeout: int = 300) -> None:
    """Run several recipes one after another on `ranks` real processes in one launch.

    A job: {"recipe": path, "output_dir": path, "resume": "", "overrides": []}; see drive.py.
    """
    listing = folder / f"jobs-{ranks}-{free_port()}.json"
    listing.write_text(json.dumps(jobs))
    script = str(Path(__file__).with_name("drive.py"))
    PORTS.append(port := free_port())
    if ranks == 1:
        command = [sys.executable, script, str(listing)]
    else:
        command = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
            "--master_port", str(port), "--no_local_rank", script, str(listing),
        ]  # fmt: skip
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert listing.with_suffix(".done").exists(), done.stdout[-4000:] + done.stderr[-8000:]


def arctic_train(
    *arguments: str, cwd: Path, timeout: int = 300, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run the command itself."""
    return subprocess.run(
        [sys.executable, "-m", "arctic_like.cli.main", *arguments],
        cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
