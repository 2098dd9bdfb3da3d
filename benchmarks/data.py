"""From files to packed training rows: ours beside what must be done in any case, and beside TRL.

    make bench-data                                   # or: python benchmarks/data.py --json out.json
    python benchmarks/data.py --size 10MB --no-trl    # quicker
    python benchmarks/data.py --million               # memory at 10 thousand and at 1 million rows

All read the same file of conversations with the same tokenizer and chat template, train the answers
only, and pack to 1,024 tokens. Each runs in a process of its own, warms up on some rows, and only then
takes the time, so start-up does not count; its peak memory is that of the process and all its
children (resident pages, those that are shared counted once for each: the worst reading).

- **alone**: transformers' `apply_chat_template` for each conversation, then the tokenizer's own
  `encode_batch` on all cores. Reads nothing, masks nothing, packs nothing, writes nothing.
- **ours**: `data.type: sft` with an empty cache. **again**: with the cache that it left.
- **TRL**: `load_dataset` and `SFTTrainer`'s preparation with `assistant_only_loss`, `packing` ("bfd") and
  each of a few `dataset_num_proc`, of which the best counts; nothing of `datasets` cached.

The goals: ours within 1.6 × alone, at least 2.5 × the rate of TRL, filled at least as well; memory flat,
less than 1.5 GB above the start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import conversations

LENGTH = 1024
PACKAGES = ("arctic-like", "transformers", "tokenizers", "datasets", "trl", "torch", "numpy")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


# --- what is measured, each in a process of its own


def alone(folder: Path, data: Path, options: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """Rendering and the tokenizer. The rows are in memory before the clock starts."""
    tokenizer = load_tokenizer(folder)
    core = tokenizer.backend_tokenizer
    rows = [json.loads(line)["messages"] for line in data.open()]

    def work(some: list[Any] = rows) -> dict[str, Any]:
        began = time.perf_counter()
        texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in some]
        rendered = time.perf_counter()
        tokens = 0
        for start in range(0, len(texts), 1000):
            found = core.encode_batch(texts[start : start + 1000], add_special_tokens=False)
            tokens += sum(map(len, found))
        ended = time.perf_counter()
        return {
            "tokens_read": tokens,
            "rendering": rendered - began,
            "tokenizer": ended - rendered,
        }

    work(rows[:200])
    return work


def ours(folder: Path, data: Path, options: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """Files → samples in an empty cache."""
    from loguru import logger

    from arctic_like.data.factory import SFTDataFactory
    from arctic_like.world import World

    logger.remove()
    tokenizer = load_tokenizer(folder)

    def prepared(path: Path, cache: Path) -> dict[str, Any]:
        config = {
            "sources": str(path), "max_length": LENGTH, "long_samples": "truncate_right",
            "cache_dir": str(cache), "num_proc": options.num_proc,
        }  # fmt: skip
        made = SFTDataFactory(SFTDataFactory.config_type.model_validate(config)).build(
            tokenizer=tokenizer, output_dir=folder, seed=0, world=World(), max_positions=LENGTH
        )
        facts = made.facts
        assert made.train is not None
        return {
            "rows": facts["samples"], "fill": facts["fill_rate"], "tokens": facts["tokens"],
            "tokens_read": sum(int(part.lengths.sum()) for part in made.train.documents),  # type: ignore[attr-defined]
        }  # fmt: skip

    with tempfile.TemporaryDirectory(dir=folder) as warm:
        prepared(head(folder, data), Path(warm))
    cache = folder / "cache"
    if options.child != "again":
        shutil.rmtree(cache, ignore_errors=True)
    return lambda: prepared(data, cache)


def trl(folder: Path, data: Path, options: argparse.Namespace) -> Callable[[], dict[str, Any]]:
    """TRL's way from the file to its packed data set, timed around its `_prepare_dataset` and
    `load_dataset`, without the rest of its constructor."""
    import datasets
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(folder)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                    num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                    pad_token_id=tokenizer.pad_token_id)
    )  # fmt: skip
    seconds = [0.0]
    prepare = SFTTrainer._prepare_dataset

    def timed(*values: Any, **more: Any) -> Any:
        began = time.perf_counter()
        result = prepare(*values, **more)
        seconds[0] += time.perf_counter() - began
        return result

    SFTTrainer._prepare_dataset = timed

    def work(path: Path = data) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            began = time.perf_counter()
            rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
            seconds[0] = time.perf_counter() - began
            trainer = SFTTrainer(
                model=model, train_dataset=rows, processing_class=tokenizer,
                args=SFTConfig(
                    output_dir=cache, max_length=LENGTH, packing=True, packing_strategy="bfd",
                    assistant_only_loss=True, dataset_num_proc=options.num_proc or None,
                    padding_free=True, use_cpu=True, report_to="none", bf16=False,
                ),
            )  # fmt: skip
            packed = trainer.train_dataset.data.column("input_ids")
            tokens = sum(chunk.values.__len__() for chunk in packed.chunks)
            return {
                "rows": len(packed), "tokens": tokens, "seconds": seconds[0],
                "fill": tokens / (len(packed) * LENGTH),
            }  # fmt: skip

    work(head(folder, data))
    return work


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def head(folder: Path, data: Path, rows: int = 200) -> Path:
    """A file with the first rows of another."""
    some = folder / f"warm-{os.getpid()}.jsonl"
    with data.open() as file:
        some.write_text("".join(line for _, line in zip(range(rows), file, strict=False)))
    return some


CHILDREN = {"alone": alone, "ours": ours, "again": ours, "trl": trl}


def child(options: argparse.Namespace) -> None:
    """Warm up, say so, wait for the parent, work, say what came of it."""
    work = CHILDREN[options.child](options.folder, options.data, options)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, began = processor_time(), time.perf_counter()
    result = work()
    result.setdefault("seconds", time.perf_counter() - began)
    result["cpu"] = processor_time() - cpu
    print("result " + json.dumps(result), flush=True)


def processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


# --- the parent


class Memory:
    """Resident memory of a process and all below it, looked at ten times a second."""

    def __init__(self, process: int) -> None:
        import psutil

        self._gone = psutil.Error
        self._process = psutil.Process(process)
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> int:
        total = 0
        try:
            for one in [self._process, *self._process.children(recursive=True)]:
                try:
                    total += one.memory_info().rss
                except self._gone:
                    continue
        except self._gone:
            pass
        return total

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, self._now())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def measured(what: str, folder: Path, data: Path, num_proc: int) -> dict[str, Any]:
    """One child's result, with its memory: at the start, and above it at most, in bytes."""
    command = [
        sys.executable, __file__, "--child", what, "--folder", str(folder), "--data", str(data),
        "--num-proc", str(num_proc),
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets"),
                   "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with (folder / f"{what}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line == "ready\n":
                memory = Memory(process.pid)
                process.stdin.write("go\n")
                process.stdin.flush()
            elif line.startswith("result "):
                memory.stop()
                result: dict[str, Any] = json.loads(line.removeprefix("result "))
                process.wait()
                shutil.rmtree(folder / "datasets", ignore_errors=True)
                return {
                    **result,
                    "num_proc": num_proc,
                    "memory_start": memory.start,
                    "memory_above": memory.peak - memory.start,
                }
    raise SystemExit(f"{what} failed: see {folder / f'{what}.log'}")


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All ways, several times over; of each the fastest."""
    data = folder / "conversations.jsonl"
    count = conversations.write(data, size=options.size)
    cores = len(os.sched_getaffinity(0))
    print(f"{data.stat().st_size / 1e6:.0f} MB, {count:,} conversations, {cores} cores", flush=True)
    ways = [("alone", 0), ("ours", options.num_proc), ("again", options.num_proc)]
    if options.trl:
        ways += [("trl", one) for one in options.trl_num_proc]
    found: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for what, num_proc in ways:
            result = measured(what, folder, data, num_proc)
            name = f"{what} ({num_proc} processes)" if what == "trl" else what
            if name not in found or result["seconds"] < found[name]["seconds"]:
                found[name] = result
    return {"bytes": data.stat().st_size, "conversations": count, "cores": cores, "ways": found}


def million(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours at several numbers of rows."""
    found = {}
    for rows in (10_000, 100_000, 1_000_000):
        data = folder / f"short-{rows}.jsonl"
        conversations.write_short(data, rows=rows)
        found[str(rows)] = {
            "bytes": data.stat().st_size,
            **measured("ours", folder, data, options.num_proc),
        }
        data.unlink()
    return found


def show(summary: dict[str, Any]) -> None:
    """The tables."""
    compared = summary.get("compared")
    if compared:
        base = compared["ways"]["alone"]["seconds"]
        print(f"{'':<20}{'seconds':>9}{'MB/s':>8}{'x alone':>9}{'filled':>8}{'memory':>15}")
        for name, one in compared["ways"].items():
            rate = compared["bytes"] / one["seconds"] / 1e6
            fill = f"{one['fill']:.2%}" if "fill" in one else ""
            print(
                f"{name:<20}{one['seconds']:>9.2f}{rate:>8.2f}{one['seconds'] / base:>9.2f}"
                f"{fill:>8}{memory_of(one):>15}"
            )
        trl_best = min(
            (one["seconds"] for name, one in compared["ways"].items() if name.startswith("trl")),
            default=None,
        )
        if trl_best:
            mine = compared["ways"]["ours"]["seconds"]
            print(f"ours is {trl_best / mine:.2f} x as fast as TRL at its best")
    for rows, one in summary.get("million", {}).items():
        print(f"{int(rows):>10,} rows: {one['seconds']:8.1f} s, {memory_of(one)}")
    print(", ".join(f"{name} {number}" for name, number in summary["versions"].items()))


def memory_of(one: dict[str, Any]) -> str:
    """ "700 + 560 MB": at the start, and above it."""
    return f"{one['memory_start'] / 1e6:.0f} + {one['memory_above'] / 1e6:.0f} MB"


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def in_bytes(text: str) -> int:
    """ "100MB" → 100000000."""
    for unit, size in UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * size)
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", type=in_bytes, default=in_bytes("100MB"))
    parser.add_argument("--rounds", type=int, default=1, help="of each the fastest counts")
    parser.add_argument("--num-proc", type=int, default=0, help="ours; 0 is one for each core")
    parser.add_argument("--trl-num-proc", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--no-trl", dest="trl", action="store_false")
    parser.add_argument("--million", action="store_true", help="memory by rows, nothing else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        conversations.write_tokenizer(folder / "tokenizer")
        summary: dict[str, Any] = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()
        }  # fmt: skip
        if options.million:
            summary["million"] = million(options, folder)
        else:
            summary["compared"] = compare(options, folder)
    show(summary)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
