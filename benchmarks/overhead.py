"""The trainer's time per step beside a bare DeepSpeed loop: same model, same batches, one process.

    make bench                                   # or: python benchmarks/overhead.py --json out.json

Blocks of steps alternate (trainer, bare, trainer, …), so that a machine that slows down slows both.
The bare loop has its batches ready in memory and writes nothing; the trainer loads, weighs, logs
every step to `metrics.jsonl` and looks for requests to stop. The goal: at most 2 % more at steps of
50 ms.

Both the wall clock and the process's CPU time are compared: on a busy machine the second is the
steadier, and it misses only what waits (for the disk, say).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    blocks: int
    steps_per_block: int
    accumulation: int
    length: int
    hidden_size: int
    zero_stage: int
    dtype: str
    threads: int


@dataclass
class Times:
    """Seconds per step of each block, in the order in which they ran."""

    trainer: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Each trainer block against the mean of the bare blocks before and after it."""
        pairs = zip(self.trainer, zip(self.bare, self.bare[1:], strict=False), strict=False)
        return [mine / statistics.fmean(around) for mine, around in pairs]

    def warm(self) -> Times:
        """Without the first block of each, in which memory is touched and kernels are chosen."""
        return Times(self.trainer[1:], self.bare[1:])


@dataclass
class Clocks:
    """The same blocks by both clocks."""

    wall: Times = field(default_factory=Times)
    cpu: Times = field(default_factory=Times)

    def add(self, kind: str, since: tuple[float, float], steps: int) -> None:
        """Note a block of so many steps that began at `since`."""
        wall, cpu = now()
        getattr(self.wall, kind).append((wall - since[0]) / steps)
        getattr(self.cpu, kind).append((cpu - since[1]) / steps)


def now() -> tuple[float, float]:
    """Wall clock and CPU time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


class BareLoop:
    """What one would write without a framework: forward, loss, backward, step."""

    def __init__(
        self, module: Any, *, optimizer: Any, config: dict[str, Any], batches: list[list[dict]]
    ) -> None:
        import deepspeed
        from torch.optim.lr_scheduler import LambdaLR

        self.scheduler = LambdaLR(optimizer, lambda step: 1.0)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.batches = batches
        self.step_number = 0

    def step(self) -> None:
        from torch.nn.functional import cross_entropy

        micro_batches = self.batches[self.step_number % len(self.batches)]
        self.step_number += 1
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            logits = self.engine(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
            labels = batch["labels"][:, 1:].flatten()
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)
            self.engine.backward(loss / len(micro_batches), scale_wrt_gas=False)
            self.engine.step()
        self.scheduler.step()


def write_recipe(folder: Path, setting: Setting) -> Path:
    """A causal recipe on random text, every document as long as a row."""
    import yaml

    letters = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(512):
            text = "".join(letters.choices("abcdefgh ", k=setting.length - 2))
            file.write(json.dumps({"text": text}) + "\n")
    steps = setting.blocks * setting.steps_per_block + 1
    recipe = {
        "type": "causal",
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "train_iters": steps,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": setting.accumulation,
        "loss_log_interval": 0,
        "model": {
            "dtype": setting.dtype,
            "disable_activation_checkpoint": True,
            "config": {
                "model_type": "llama", "hidden_size": setting.hidden_size,
                "intermediate_size": 3 * setting.hidden_size, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 4,
                "max_position_embeddings": setting.length,
            },
        },
        "tokenizer": {"type": "byte"},
        "data": {
            "sources": [str(folder / "text.jsonl")], "max_length": setting.length,
            "cache_dir": str(folder / "cache"), "pack_samples": False,
        },
        "optimizer": {"type": "adamw", "learning_rate": 1e-4},
        "scheduler": {"type": "huggingface", "name": "constant"},
        "deepspeed": {"zero_optimization": {"stage": setting.zero_stage}},
        "logger": {"level": "WARNING"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def twin(module: Any) -> Any:
    """The same model with the same weights, without the hooks that an engine put on the first."""
    fresh = type(module)(copy.deepcopy(module.config)).to(module.dtype)
    fresh.load_state_dict(module.state_dict())
    return fresh.train()


def attach(trainer: Any, setting: Setting, clocks: Clocks) -> None:
    """Let bare blocks run between blocks of the trainer's steps."""
    from arctic_like.engine.ds_config import deepspeed_config
    from arctic_like.registry import build

    stream = trainer.equipment.loader.steps(0)
    batches = [[micro.data for micro in next(stream).micro_batches] for _ in range(64)]
    module = twin(trainer.module)
    optimizer = build(trainer.config.optimizer, "optimizer")
    bare = BareLoop(
        module,
        optimizer=optimizer.build(model=module, device="cpu", offload=False),
        config=deepspeed_config(
            section={"zero_optimization": {"stage": setting.zero_stage}}, dtype=setting.dtype,
            micro_batch_size=4, gradient_accumulation_steps=setting.accumulation, world_size=1,
            hidden_size=setting.hidden_size, on_cpu=True,
        ),
        batches=batches,
    )  # fmt: skip
    steps = setting.steps_per_block
    mark = now()

    def between() -> None:
        nonlocal mark
        if trainer.global_step % steps:
            return
        if trainer.global_step:
            clocks.add("trainer", mark, steps)
        mark = now()
        for _ in range(steps):
            bare.step()
        clocks.add("bare", mark, steps)
        mark = now()

    trainer.on_step_start = between


def measure(setting: Setting) -> Clocks:
    """Run the trainer with bare blocks in between."""
    import torch

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.stop import StopRequest

    torch.set_num_threads(setting.threads)
    clocks = Clocks()
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(write_recipe(Path(name), setting), [])
        with contextlib.redirect_stdout(io.StringIO()):
            execute(
                recipe, output_dir=Path(name) / "run", resume="", stop=StopRequest(),
                inspect=lambda trainer: attach(trainer, setting, clocks),
            )  # fmt: skip
    return Clocks(clocks.wall.warm(), clocks.cpu.warm())


def compare(times: Times) -> dict[str, Any]:
    """The ratio with its spread: the median of paired blocks, and a bootstrap interval of it."""
    ratios = times.ratios()
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    low, *_, high = statistics.quantiles(ratios, n=4)
    return {
        "bare_step_ms": 1000 * statistics.median(times.bare),
        "trainer_step_ms": 1000 * statistics.median(times.trainer),
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
        "interval_95_percent": [100 * (medians[50] - 1), 100 * (medians[1949] - 1)],
        "quartiles_of_blocks_percent": [100 * (low - 1), 100 * (high - 1)],
        "pairs_of_blocks": len(ratios),
    }


def summary(clocks: Clocks, setting: Setting) -> dict[str, Any]:
    """Everything that one needs to know to believe the ratio."""
    packages = ("torch", "deepspeed", "transformers", "arctic-like")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**{p: version(p) for p in packages}, "python": platform.python_version()},
        "machine": {
            "processor": processor(), "cores": os.cpu_count(), "load": list(os.getloadavg()),
        },
        "setting": asdict(setting),
        "wall": compare(clocks.wall),
        "cpu": compare(clocks.cpu),
    }  # fmt: skip


def processor() -> str:
    """The CPU's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=250)
    parser.add_argument("--steps-per-block", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--length", type=int, default=72)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--limit", type=float, help="fail above so many percent (CPU time)")
    arguments = vars(parser.parse_args())
    out, limit = arguments.pop("json"), arguments.pop("limit")
    setting = Setting(**arguments)
    result = summary(measure(setting), setting)
    for clock in ("wall", "cpu"):
        one = result[clock]
        low, high = one["interval_95_percent"]
        print(
            f"{clock:4}  bare {one['bare_step_ms']:.1f} ms, "
            f"trainer {one['trainer_step_ms']:.1f} ms: {one['overhead_percent']:+.2f} % "
            f"(95 %: {low:+.2f} to {high:+.2f}; "
            f"{one['pairs_of_blocks']} pairs of blocks of {setting.steps_per_block} steps)"
        )
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")
    return int(limit is not None and result["cpu"]["overhead_percent"] > limit)


if __name__ == "__main__":
    sys.exit(main())
