"""Time and peak memory of a training step beside transformers' Trainer and TRL: same weights, rows and order.

    python benchmarks/step.py                      # a small Llama on two CPU cores, packed rows of 1,024
    python benchmarks/step.py --device cuda --dtype bf16 --model 1b --length 4096 --share 1

Each contender is a process of its own with the same start weights, the same packed rows in the same order,
AdamW, a constant learning rate and clipping at 1. They take turns at blocks of steps, so that a machine that
slows down slows all; what is compared is the median of the ratios of neighbouring blocks. Memory is the
peak above what the process had after its imports (of the allocator, on CUDA). `--turns whole` runs one
after another, where they do not fit into memory together.

Losses are compared too: contenders that do not agree do not do the same work, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32_000},
    "0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
             "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 128_256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
"""Llamas; 1b and 8b are Llama 3's own sizes."""
RATE = 1e-4


# What a contender's process does ----------------------------------------------------------------


class Turns:
    """The contender's side of the turns: waits for its turn, times a block, tells what it took."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting, self.done = setting, 0
        self.begun = self.begun_cpu = 0.0
        self.above = resident("VmRSS") if setting["device"] == "cpu" else 0

    def before_step(self, loss: Callable[[], float]) -> None:
        """Before each step: where one block is done and another begins, tell, and wait for the turn."""
        if self.done % self.setting["steps"] == 0:
            self.wait_for_device()
            if self.done:
                count = self.setting["steps"]
                say({"seconds": (time.perf_counter() - self.begun) / count,
                     "cpu": (time.process_time() - self.begun_cpu) / count, "loss": loss()})  # fmt: skip
            else:
                say({"ready": True})
            line = sys.stdin.readline()
            if not line.strip() or json.loads(line).get("end"):
                self._end()
            self.begun, self.begun_cpu = time.perf_counter(), time.process_time()
        self.done += 1

    def wait_for_device(self) -> None:
        if self.setting["device"] == "cuda":
            import torch

            torch.cuda.synchronize()

    def _end(self) -> None:
        if self.setting["device"] == "cuda":
            import torch

            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resident("VmHWM") - self.above
        say({"peak": peak})
        os._exit(0)


CHANNEL: Any = None


def say(message: dict[str, Any]) -> None:
    CHANNEL.write(json.dumps(message) + "\n")
    CHANNEL.flush()


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def ours(folder: Path, setting: dict[str, Any]) -> None:
    """arctic_like, from a recipe; its rows are written down for the others."""
    import deepspeed  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    import yaml

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.stop import StopRequest

    threads(setting)
    turns = Turns(setting)
    recipe = {
        "type": "sft",
        "device": setting["device"],
        "epochs": 1000,
        "micro_batch_size": setting["rows"],
        "loss_log_interval": 0,
        "train_log_iter_interval": setting["steps"],
        "model": {
            "name_or_path": str(folder / "model"), "dtype": setting["dtype"],
            "disable_activation_checkpoint": not setting["checkpointing"],
            **({"peft_config": LORA} if setting["lora"] else {}),
        },
        "data": {
            "sources": [{"name_or_path": str(folder / "rows.jsonl"), "shape": "tokenised"}],
            "max_length": setting["length"], "cache_dir": str(folder / "cache"), "pack_samples": True,
        },
        "optimizer": {"type": "adamw", "learning_rate": RATE, "weight_decay": 0.0},
        "scheduler": {"type": "huggingface", "name": "constant"},
        "deepspeed": {"zero_optimization": {"stage": setting["stage"]}, "gradient_clipping": 1.0},
        "logger": {"level": "WARNING"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def attach(trainer: Any) -> None:
        rows = folder / "rows.pt"
        if not rows.exists():
            stream = trainer.equipment.loader.steps(0)
            kept = [next(stream).micro_batches[0].data for _ in range(setting["batches"])]
            names = ("input_ids", "labels", "position_ids")
            torch.save([{n: batch[n] for n in names} for batch in kept], rows)
        trainer.on_step_start = lambda: turns.before_step(lambda: last_loss(trainer))

    execute(
        load_recipe(path, []),
        output_dir=folder / "run",
        resume="",
        stop=StopRequest(),
        inspect=attach,
    )


def last_loss(trainer: Any) -> float:
    line = (trainer.session.directory.path / "metrics.jsonl").read_text().splitlines()[-1]
    return float(json.loads(line).get("loss", "nan"))


LORA = {
    "peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear",
}  # fmt: skip


def huggingface(folder: Path, setting: dict[str, Any]) -> None:
    """transformers' Trainer on rows with position ids, so that documents are isolated."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    def make(model: Any, rows: Any, gate: Any) -> Any:
        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                from torch.utils.data import SequentialSampler

                return SequentialSampler(rows)

        return InOrder(
            model=model, args=TrainingArguments(**common_arguments(folder, setting)),
            train_dataset=rows, data_collator=default_data_collator, callbacks=[gate],
        )  # fmt: skip

    with_transformers(folder, setting, make)


def trl(folder: Path, setting: dict[str, Any]) -> None:
    """TRL's SFTTrainer (its loss in chunks by default) on the same rows."""
    from transformers import AutoTokenizer, default_data_collator
    from trl import SFTConfig, SFTTrainer

    def make(model: Any, rows: Any, gate: Any) -> Any:
        class InOrder(SFTTrainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                from torch.utils.data import SequentialSampler

                return SequentialSampler(rows)

        return InOrder(
            model=model, processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            train_dataset=rows, callbacks=[gate],
            data_collator=default_data_collator,
            args=SFTConfig(
                **common_arguments(folder, setting), max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                use_liger_kernel=setting["contender"] == "trl+liger",
            ),
        )  # fmt: skip

    with_transformers(folder, setting, make)


def with_transformers(folder: Path, setting: dict[str, Any], make: Callable[..., Any]) -> None:
    """Train with a Trainer of transformers' family that `make` builds."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    threads(setting)
    turns = Turns(setting)
    batches = torch.load(folder / "rows.pt")
    rows = Dataset.from_list(
        [{name: row.tolist() for name, row in zip(batch, one, strict=True)}
         for batch in batches for one in zip(*batch.values(), strict=True)]
    )  # fmt: skip
    del batches
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting["dtype"]]
    options = {"attn_implementation": setting["attention"]} if setting["attention"] else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, **options)
    model.config.use_cache = False
    if setting["lora"]:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(**{k: v for k, v in LORA.items() if k != "peft_type"})
        )
        model.enable_input_require_grads()
    losses: list[float] = []

    class Gate(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turns.before_step(lambda: losses[-1])

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            losses.append(float((logs or {}).get("loss", "nan")))

    make(model, rows, Gate()).train()


def common_arguments(folder: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Of `TrainingArguments`: nothing that costs time and is not needed."""
    return {
        "output_dir": str(folder / f"{setting['contender']}-run"),
        "per_device_train_batch_size": setting["rows"],
        "max_steps": 100_000, "learning_rate": RATE, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant", "logging_steps": setting["steps"],
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "seed": 1,
        "remove_unused_columns": False, "gradient_checkpointing": setting["checkpointing"],
        "use_cpu": setting["device"] == "cpu", "bf16": False, "fp16": False,
        "logging_nan_inf_filter": False, "dataloader_pin_memory": setting["device"] == "cuda",
        "optim": "adamw_torch_fused", "torch_compile": setting["contender"].endswith("+compile"),
        "include_num_input_tokens_seen": False,
    }  # fmt: skip


def threads(setting: dict[str, Any]) -> None:
    import torch

    torch.manual_seed(0)
    if setting["threads"]:
        torch.set_num_threads(setting["threads"])


CONTENDERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "ours": ours, "huggingface": huggingface, "huggingface+compile": huggingface, "trl": trl,
    "trl+liger": trl,
}  # fmt: skip


# What the benchmark itself does -----------------------------------------------------------------


def prepare(folder: Path, setting: dict[str, Any], share: float) -> None:
    """Random weights, a tokenizer of the vocabulary's size, and documents of which a share is trained."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    shape = MODELS[setting["model"]]
    config = LlamaConfig(
        **shape, max_position_embeddings=setting["length"], tie_word_embeddings=True
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[setting["dtype"]]
    with torch.device("cuda" if setting["device"] == "cuda" else "cpu"):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "model")
    words = {"<pad>": 0, "<eos>": 1} | {f"w{n}": n for n in range(2, shape["vocab_size"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>", eos_token="<eos>",
    ).save_pretrained(folder / "model")  # fmt: skip
    draw = random.Random(0)
    length, needed = setting["length"], setting["batches"] * setting["rows"]
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(needed):
            first = draw.randrange(length // 4, length // 2)
            for size in (first, length - first):  # two documents fill a row exactly
                ids = [draw.randrange(2, min(20_000, shape["vocab_size"])) for _ in range(size)]
                start = size - max(1, round(size * share))
                labels = [-100] * start + ids[start:]
                file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


class Contender:
    """A contender's process, as the benchmark sees it."""

    def __init__(self, name: str, folder: Path, setting: dict[str, Any]) -> None:
        self.name, self.seconds, self.cpu, self.losses, self.peak = name, [], [], [], 0
        told, channel = os.pipe()
        self._told = os.fdopen(told)
        mine = {**setting, "contender": name, "channel": channel}
        self._log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--contender", json.dumps(mine), "--folder", str(folder)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, pass_fds=(channel,),
            text=True,
        )  # fmt: skip
        os.close(channel)
        self._log_path = folder / f"{name}.log"
        self._hear("ready")

    def turn(self) -> None:
        """Let it do one block."""
        self._tell({"go": True})
        told = self._hear("seconds")
        self.seconds.append(told["seconds"])
        self.cpu.append(told["cpu"])
        self.losses.append(told["loss"])

    def end(self) -> None:
        self._tell({"end": True})
        self.peak = self._hear("peak")["peak"]
        self._process.wait()

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self, what: str) -> dict[str, Any]:
        line = self._told.readline()
        if not line:
            tail = "\n".join(self._log_path.read_text().splitlines()[-15:])
            raise SystemExit(f"{self.name} ended before it was {what}:\n{tail}")
        message: dict[str, Any] = json.loads(line)
        return message


def measure(setting: dict[str, Any], share: float) -> list[dict[str, Any]]:
    """All contenders at one share of trained tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, setting, share)
        # The first has written the rows down when it is ready.
        running = []
        if setting["turns"] == "blocks":
            running = [Contender(one, folder, setting) for one in setting["contenders"]]
            for number in range(setting["blocks"] + 1):
                for one in running[number % len(running) :] + running[: number % len(running)]:
                    one.turn()
            for one in running:
                one.end()
        else:
            for which in setting["contenders"]:
                one = Contender(which, folder, setting)
                for _ in range(setting["blocks"] + 1):
                    one.turn()
                one.end()
                running.append(one)
    first = running[0]
    return [
        {
            "contender": one.name, "share": share, "step_ms": 1000 * statistics.median(one.seconds[1:]),
            "ratio": statistics.median(
                a / b for a, b in zip(first.seconds[1:], one.seconds[1:], strict=True)
            ),
            "cpu_ms": 1000 * statistics.median(one.cpu[1:]),
            "cpu_ratio": statistics.median(
                a / b for a, b in zip(first.cpu[1:], one.cpu[1:], strict=True)
            ),
            "peak_mb": one.peak / 2**20, "peak_ratio": first.peak / max(one.peak, 1),
            "losses": one.losses,
            "agrees": all(abs(a - b) <= 2e-3 * abs(b)
                          for a, b in zip(first.losses[1:], one.losses[1:], strict=True)),
        }
        for one in running
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="of activations")
    parser.add_argument("--attention", default="", help="of the others; ours chooses")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO, ours")
    parser.add_argument("--rows", type=int, default=1, help="packed rows a step")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.25, 1.0], help="of tokens trained"
    )
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--batches", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--turns", choices=("blocks", "whole"), default="blocks")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS),
                        default=["ours", "huggingface", "trl"])  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    if arguments["contender"]:
        global CHANNEL
        setting = json.loads(arguments["contender"])
        CHANNEL = os.fdopen(setting["channel"], "w")
        CONTENDERS[setting["contender"]](arguments["folder"], setting)
        return 0
    out, shares = arguments.pop("json"), arguments.pop("share")
    setting = {k: v for k, v in arguments.items() if k not in ("contender", "folder")}
    results = []
    for share in shares:
        for one in measure(setting, share):
            results.append(one)
            print(
                f"{share:4.0%} trained  {one['contender']:20} {one['step_ms']:8.1f} ms   "
                f"ours is {one['ratio']:.2f} x   CPU {one['cpu_ms']:8.1f} ms {one['cpu_ratio']:.2f} x   "
                f"{one['peak_mb']:6.0f} MiB   "
                f"ours is {one['peak_ratio']:.2f} x"
                + ("" if one["agrees"] else "   LOSSES DIFFER"),
                flush=True,
            )
    if out:
        out.write_text(json.dumps(summary(setting, results), indent=2) + "\n")
    return 0


def summary(setting: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    versions = {}
    for package in (
        "torch",
        "deepspeed",
        "transformers",
        "trl",
        "peft",
        "liger-kernel",
        "arctic-like",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions, "python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "load": list(os.getloadavg())},
        "setting": setting, "results": results,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
