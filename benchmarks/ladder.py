"""The longest row that trains: one rung a command, full steps of this trainer on one device.

    python benchmarks/ladder.py --model 8b --length 65536                     # the loss is always tiled
    python benchmarks/ladder.py --model 8b --length 131072 --offload --tiled-mlp
    python benchmarks/ladder.py --model 1b --length 1048576 --depth 4 --offload --tiled-mlp   # labelled so

Random weights and tokens, every token trained, one document a row, ZeRO 2 with the given optimizer. A rung
prints its step time, tokens and model FLOPs a second, and the peak of memory; or at which step it does not
fit. --depth keeps only so many layers: memory and time are then those of the shallow model, and the line
says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from step import MODELS, resident  # type: ignore[import-not-found]

OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what the recipe says of the optimizer, and of DeepSpeed; bytes of states and masters a parameter
    "fp32": ({"type": "adamw"}, {}),
    "bf16": ({"type": "adamw_bf16"},
             {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}),
    "offload": ({"type": "cpu_adam"}, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
}  # fmt: skip


def recipe(folder: Path, arguments: argparse.Namespace) -> Path:
    """One row a step, of one document as long as the row."""
    import yaml

    shape = dict(MODELS[arguments.model])
    if arguments.depth:
        shape["num_hidden_layers"] = arguments.depth
    draw, length = random.Random(0), arguments.length
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(arguments.steps + 2):
            file.write(
                json.dumps({"input_ids": [draw.randrange(200) for _ in range(length)]}) + "\n"
            )
    optimizer, deepspeed = OPTIMIZERS[arguments.optimizer]
    zero = {"stage": arguments.stage, **deepspeed.get("zero_optimization", {})}
    made = {
        "type": "causal", "device": arguments.device, "train_iters": arguments.steps,
        "micro_batch_size": 1, "loss_log_interval": 0,
        "model": {
            "dtype": arguments.dtype,
            "config": {"model_type": "llama", **shape, "max_position_embeddings": length},
            **({"attn_implementation": arguments.attention} if arguments.attention else {}),
        },
        "tokenizer": {"type": "byte"},
        "data": {
            "sources": [{"name_or_path": str(folder / "rows.jsonl"), "shape": "tokenised"}],
            "max_length": length, "cache_dir": str(folder / "cache"),
        },
        "optimizer": {**optimizer, "learning_rate": 1e-5},
        "deepspeed": {**deepspeed, "zero_optimization": zero},
        "callbacks": [{"type": "throughput"}],
        "tiled_mlp_compute": arguments.tiled_mlp,
        "activation_checkpoint_cpu_offload": arguments.offload,
        "logger": {"level": "ERROR"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def climb(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the rung. Returns what it took, or `failed`."""
    import torch

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.stop import StopRequest

    cuda = arguments.device == "cuda"
    seconds: list[float] = []

    def attach(trainer: Any) -> None:
        plain = trainer.step

        def step(micro_batches: Any) -> None:
            begun = time.perf_counter()
            plain(micro_batches)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)

        trainer.step = step

    before = 0 if cuda else resident("VmRSS")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"length": arguments.length}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                execute(
                    load_recipe(recipe(folder, arguments), []), output_dir=folder / "run", resume="",
                    stop=StopRequest(), inspect=attach,
                )  # fmt: skip
        except (torch.OutOfMemoryError, MemoryError) as error:
            return {**found, "failed": f"out of memory at step {len(seconds) + 1}: {error}"}
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
    step_s = statistics.median(seconds[1:])
    return {
        **found, "step_s": step_s, "tokens_per_second": arguments.length / step_s,
        "flops_per_second": last.get("throughput/flops_per_second"), "mfu": last.get("mfu"),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before,
        "loss": last["loss"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--depth", type=int, default=0, help="layers; all of them unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="fp32")
    parser.add_argument("--attention", default="")
    parser.add_argument("--offload", action="store_true", help="checkpoints to the host")
    parser.add_argument("--tiled-mlp", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path, help="append the result here, a line each")
    arguments = parser.parse_args()
    found = climb(arguments)
    depth = f" (only {arguments.depth} layers)" if arguments.depth else ""
    name = f"{arguments.model}{depth}, {arguments.length:,} tokens, {arguments.optimizer} optimizer"
    if "failed" in found:
        print(f"{name}: {found['failed'].splitlines()[0]}")
    else:
        flops = found["flops_per_second"]
        print(
            f"{name}: {found['step_s']:.2f} s a step, {found['tokens_per_second']:,.0f} tokens/s, "
            + (f"{flops / 1e12:.1f} TFLOP/s, " if flops else "")
            + f"peak {found['peak_bytes'] / 2**30:.2f} GiB"
        )
    if arguments.json:
        setting = {k: str(v) for k, v in vars(arguments).items() if k != "json"}
        with arguments.json.open("a") as file:
            file.write(json.dumps({**setting, **found, "cores": os.cpu_count()}) + "\n")
    return int("failed" in found)


if __name__ == "__main__":
    sys.exit(main())
