"""From the command to the end of the first step, beside a bare DeepSpeed loop, transformers' Trainer and TRL.

    python benchmarks/startup.py                       # a small Llama on the CPU
    python benchmarks/startup.py --device cuda --hidden 2048 --layers 16

Each start is a process of its own: imports, the same model folder, the same conversations (tokenised anew
every time), one optimizer step of the same number of rows. They take turns, so that a machine that slows
down slows all; what is compared is the median of the ratios of neighbouring starts. Ours also does what
the others do not: it checks recipe and data, locks and describes the run, logs and writes metrics. Compiled
operators and the files of all of them are warm: the first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FIRST = "first step done"
ROWS, LENGTH = 4, 256


def bare(folder: Path, device: str) -> None:
    """DeepSpeed and transformers, and nothing else."""
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    places = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(places)
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", auto_mpi_discovery=False)
    tokenizer, texts = _tokenised(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rate = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=rate,
        config={"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 2}},
    )  # fmt: skip
    batch = tokenizer.pad({"input_ids": texts[:ROWS]}, return_tensors="pt").to(engine.device)
    engine.backward(engine(**batch, labels=batch["input_ids"]).loss)
    engine.step()
    _told()


def huggingface(folder: Path, device: str) -> None:
    """transformers' Trainer."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    tokenizer, texts = _tokenised(folder)
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=TrainingArguments(**_arguments(folder, device)),
        train_dataset=Dataset.from_dict({"input_ids": texts}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[_teller()],
    ).train()


def trl(folder: Path, device: str) -> None:
    """TRL's SFTTrainer, packed."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    SFTTrainer(
        model=str(folder / "model"), processing_class=tokenizer, callbacks=[_teller()],
        train_dataset=load_dataset(
            "json", data_files=str(folder / "talks.jsonl"), split="train",
            cache_dir=str(folder / f"datasets-{os.getpid()}"),
        ),
        args=SFTConfig(**_arguments(folder, device), max_length=LENGTH, packing=True),
    ).train()  # fmt: skip


def _tokenised(folder: Path) -> tuple[Any, list[list[int]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    talks = [json.loads(line)["messages"] for line in (folder / "talks.jsonl").open()]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    return tokenizer, tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]


def _arguments(folder: Path, device: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": ROWS, "max_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": device == "cpu",
        "bf16": False, "fp16": False,
    }  # fmt: skip


def _teller() -> Any:
    from transformers import TrainerCallback

    class Teller(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _told()

    return Teller()


def _told() -> None:
    print(FIRST, flush=True)


def ours(folder: Path, device: str, number: int) -> list[str]:
    """The command, with a recipe; its data cache is new each time."""
    import yaml

    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "type": "sft", "device": device, "train_iters": 1, "micro_batch_size": ROWS,
        "model": {"name_or_path": str(folder / "model"), "dtype": "fp32"},
        "data": {"sources": [str(folder / "talks.jsonl")], "max_length": LENGTH,
                 "cache_dir": str(folder / f"cache-{number}")},
        "optimizer": {"type": "adamw", "learning_rate": 1e-4},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }))  # fmt: skip
    return [
        sys.executable, "-m", "arctic_like", str(path), f"output_dir={folder / f'run-{number}'}",
    ]  # fmt: skip


OTHERS: dict[str, Callable[[Path, str], None]] = {
    "bare DeepSpeed": bare, "transformers": huggingface, "TRL": trl,
}  # fmt: skip
MARK = re.compile(rf"{FIRST}|first step [\d.]+ s after the start.*")


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Random weights with our byte tokenizer, and conversations."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from arctic_like.tokenizer.byte import byte_tokenizer

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=len(tokenizer), max_position_embeddings=LENGTH,
    )).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    with (folder / "talks.jsonl").open("w") as file:
        for number in range(arguments.talks):
            turns = [{"role": "user", "content": f"{number}?"},
                     {"role": "assistant", "content": f"{number} " * 10}]  # fmt: skip
            file.write(json.dumps({"messages": turns}) + "\n")


def start(command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds until the first step is done, and what was said then."""
    began = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
            # one ninja for all: two versions of it compile DeepSpeed's operators anew in turns
            env={**os.environ, "COLUMNS": "400", "HF_HUB_OFFLINE": "1",
                 "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        )  # fmt: skip
        assert process.stdout
        seconds, said = 0.0, ""
        for line in process.stdout:
            log.write(line)
            if not said and (found := MARK.search(line)):
                seconds, said = time.perf_counter() - began, found[0]
    if process.wait() or not said:
        sys.exit(f"{command} failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return seconds, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--talks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=[*OTHERS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        OTHERS[arguments.contender](arguments.folder, arguments.device)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, arguments)
        seconds: dict[str, list[float]] = {"ours": [], **{other: [] for other in OTHERS}}
        said = ""
        for number in range(arguments.rounds + 1):
            for contender, taken in seconds.items():
                one = [sys.executable, __file__, "--contender", contender, "--folder", name,
                       "--device", arguments.device]  # fmt: skip
                command = ours(folder, arguments.device, number) if contender == "ours" else one
                passed, told = start(command, folder)
                said = told if contender == "ours" else said
                if number:
                    taken.append(passed)
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
    show(seconds, said, arguments)


def show(seconds: dict[str, list[float]], said: str, arguments: argparse.Namespace) -> None:
    """A table, and the same as JSON."""
    rows = {}
    print(f"\n{'':16}{'seconds':>9}{'ours / it':>11}")
    for contender, taken in seconds.items():
        ratios = [own / other for own, other in zip(seconds["ours"], taken, strict=True)]
        rows[contender] = {"seconds": statistics.median(taken), "ratio": statistics.median(ratios)}
        print(f"{contender:16}{rows[contender]['seconds']:9.2f}{rows[contender]['ratio']:11.2f}")
    print(f"\n{said}")
    if arguments.json:
        arguments.json.write_text(json.dumps({
            "starts": rows, "parts": said, "python": platform.python_version(),
            "versions": {name: _version(name) for name in ("torch", "deepspeed", "transformers", "trl")},
            "arguments": {k: str(v) for k, v in vars(arguments).items()},
        }, indent=1))  # fmt: skip


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
