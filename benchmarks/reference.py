"""What DPO's reference costs in memory: a second model, the base under a disabled adapter, a table.

    python benchmarks/reference.py                     # or: --json out.json --steps 3

The same pairs, seed and policy, a Llama of 42 million weights in fp32, ZeRO stage 0 on a CPU, one process
each. Memory is the peak of resident pages above those after the imports; the reference's table is made
within the same run, before there is a policy. The losses of each line of the table are shown as well: all
that train the same weights must have the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("torch", "deepspeed", "transformers", "peft")
MODEL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "vocab_size": 16_000, "max_position_embeddings": 256,
}  # fmt: skip
LORA = {"type": "lora", "r": 8, "target_modules": "all-linear"}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "second": ("all weights, a second model", {}),
    "table": ("all weights, precomputed", {"precompute_reference": True}),
    "lora_second": ("LoRA, a second model", {"ref_model": {"config": MODEL, "dtype": "fp32"}}),
    "lora_disabled": ("LoRA, the base under the disabled adapter", {}),
    "lora_table": ("LoRA, precomputed", {"precompute_reference": True}),
}
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


def write_pairs(path: Path, *, count: int = 24) -> None:
    """Pairs of answers of about a hundred bytes."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            good, bad = (" ".join(draw.choices(WORDS, k=16)) for _ in range(2))
            row = {"prompt": f"{number}: what is there?", "chosen": good, "rejected": bad}
            file.write(json.dumps(row) + "\n")


def recipe(way: str, folder: Path, *, steps: int) -> dict[str, Any]:
    """One of `WAYS`."""
    model = {"config": MODEL, "dtype": "fp32", "disable_activation_checkpoint": True}
    adapter = {"peft_config": LORA} if way.startswith("lora") else {}
    return {
        "type": "dpo", "device": "cpu", "seed": 7, "model": {**model, **adapter}, **WAYS[way][1],
        "tokenizer": {"type": "byte"},
        "data": {"type": "dpo", "sources": [str(folder / "pairs.jsonl")], "max_length": 192,
                 "num_proc": 1, "cache_dir": str(folder / f"cache-{way}")},
        "optimizer": {"type": "adamw", "learning_rate": 1e-4},
        "scheduler": {"type": "huggingface", "name": "constant"},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "micro_batch_size": 2, "global_batch_size": 4, "train_iters": steps,
        "train_log_iter_interval": 1, "checkpoint": [], "logger": {"level": "WARNING"},
    }  # fmt: skip


def resident(what: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux's /proc/self/status")


def child(way: str, folder: Path, *, steps: int) -> None:
    """One run; the last line printed is what came of it."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from arctic_like import load_recipe, run

    path = folder / f"{way}.yaml"
    path.write_text(yaml.safe_dump(recipe(way, folder, steps=steps)))
    loaded = load_recipe(path, [f"output_dir={folder / way}"])
    start = resident("VmRSS")
    run(loaded)
    peak = resident("VmHWM")
    lines = [json.loads(line) for line in (folder / way / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "grad_norm" in line]
    print(json.dumps({"start": start, "above": peak - start, "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, steps=options.steps)
        return
    found = {}
    with tempfile.TemporaryDirectory() as made:
        write_pairs(Path(made) / "pairs.jsonl")
        for way in WAYS:
            command = [
                sys.executable,
                __file__,
                "--child",
                way,
                "--folder",
                made,
                "--steps",
                str(options.steps),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{way} failed:\n{done.stderr[-4000:]}")
            found[way] = json.loads(done.stdout.splitlines()[-1])
    print(f"{'':<45}{'above the imports':>18}   losses")
    for way, one in found.items():
        losses = " ".join(f"{loss:.6f}" for loss in one["losses"])
        print(f"{WAYS[way][0]:<45}{one['above'] / 1e6:>15.0f} MB   {losses}")
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    if options.json:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        summary = {"when": when, "versions": versions, "model": MODEL, "ways": found}
        options.json.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
