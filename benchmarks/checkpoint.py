"""How long the step that saves is held up: at once, in the background, and a plain copy of the same bytes.

    python benchmarks/checkpoint.py                  # about 1.1 GB of state; needs three times that in memory

One run of a Llama with random data, ZeRO 2, fp32. Of every save: the time until training goes on,
and beside it, directly before, a copy of as many bytes into memory that was used before, as torch
copies. The steps behind a save are timed too: a disk and a second thread are not free.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def recipe(folder: Path, arguments: argparse.Namespace, *, asynchronous: bool) -> Path:
    """Documents of one row each, and a save after every few steps."""
    import yaml

    data = folder / "text.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"text": f"{n} " * 30}) + "\n" for n in range(200)))
    every = arguments.every
    made = {
        "type": "causal", "device": arguments.device, "train_iters": every * (arguments.saves + 1),
        "micro_batch_size": 1, "loss_log_interval": 0,
        "model": {
            "dtype": "fp32", "disable_activation_checkpoint": True,
            "config": {
                "model_type": "llama", "hidden_size": arguments.hidden,
                "intermediate_size": 3 * arguments.hidden, "num_hidden_layers": arguments.layers,
                "num_attention_heads": 8, "max_position_embeddings": 128,
            },
        },
        "tokenizer": {"type": "byte"},
        "data": {"sources": [str(data)], "max_length": 64, "cache_dir": str(folder / "cache")},
        "optimizer": {"type": "adamw", "learning_rate": 1e-5},
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "checkpoint": [{"type": "deepspeed", "save_every_n_steps": every, "keep_last": 1,
                        "asynchronous": asynchronous}],
        "logger": {"level": "WARNING"},
    }  # fmt: skip
    path = folder / f"recipe-{asynchronous}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def plain_copy(size: int) -> Callable[[], float]:
    """A function that copies so many bytes between two pieces of memory, and says how long it took."""
    import torch

    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    def copy() -> float:
        begun = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - begun

    copy()
    return copy


def measure(folder: Path, arguments: argparse.Namespace, *, asynchronous: bool) -> dict[str, Any]:
    """The held-up times of all saves of one run, and its steps."""
    import torch

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.stop import StopRequest

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    held: list[float] = []
    copies: list[float] = []
    quiet: list[float] = []
    behind: list[float] = []
    size = 0

    def attach(trainer: Any) -> None:
        nonlocal size
        plain = trainer.checkpoint
        count = sum(p.numel() for p in trainer.module.parameters())
        size = 16 * count  # weights, master weights, two moments
        copy = plain_copy(size)

        def checkpoint() -> None:
            copies.append(statistics.median(copy() for _ in range(3)))
            begun = time.perf_counter()
            plain()
            held.append(time.perf_counter() - begun)

        trainer.checkpoint = checkpoint
        step = trainer.step

        def timed(micro_batches: Any) -> None:
            begun = time.perf_counter()
            step(micro_batches)
            under_way = any(not e.background.over for e in trainer.equipment.saver.engines
                            if e.background is not None)  # fmt: skip
            if trainer.global_step > 0:
                (behind if under_way else quiet).append(time.perf_counter() - begun)

        trainer.step = timed

    execute(
        load_recipe(recipe(folder, arguments, asynchronous=asynchronous), []),
        output_dir=folder / f"run-{asynchronous}", resume="", stop=StopRequest(), inspect=attach,
    )  # fmt: skip
    return {
        "bytes": size, "held_up_s": held, "copy_s": copies,
        "ratios": [a / b for a, b in zip(held, copies, strict=True)],
        "step_s": statistics.median(quiet),
        "step_behind_a_save_s": statistics.median(behind) if behind else None,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--every", type=int, default=25, help="steps between saves")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one unless given")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for kind, asynchronous in (("at once", False), ("background", True)):
            one = results[kind] = measure(Path(name), arguments, asynchronous=asynchronous)
            shown = ", ".join(f"{s:.3f}" for s in one["held_up_s"])
            print(
                f"{kind:10}  {one['bytes'] / 1e9:.2f} GB   held up {shown} s   copy "
                f"{statistics.median(one['copy_s']):.3f} s   ratios "
                + ", ".join(f"{ratio:.2f}" for ratio in one["ratios"])
                + f"   step {1000 * one['step_s']:.0f} ms"
                + (f", behind a save {1000 * one['step_behind_a_save_s']:.0f} ms"
                   if one["step_behind_a_save_s"] else ""),
                flush=True,
            )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {p: version(p) for p in ("torch", "deepspeed", "arctic-like")}
            | {"python": platform.python_version()},
            "machine": {"cores": os.cpu_count(), "load": list(os.getloadavg())},
            "results": results,
        }, indent=2) + "\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
