"""Whole runs over several sources and over streams: sources told apart, splits that change nothing,
resumes of streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.tools import (
    drive,
    environment,
    lines,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

WEB, CODE = "loss/web.jsonl", "loss/code"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    write_conversations(folder / "web.jsonl", count=40, seed=1)
    write_conversations(folder / "few.jsonl", count=12, seed=2)
    return folder


def sources(data: Path, *weights: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"name_or_path": str(data / "web.jsonl")},
        {"name_or_path": str(data / "few.jsonl"), "label": "code"},
    ]
    for source, weight in zip(found, weights, strict=False):
        source["weight"] = weight
    return found


def job(folder: Path, name: str, content: dict[str, Any], **more: Any) -> dict[str, Any]:
    path = write_recipe(folder / f"{name}.yaml", content)
    return {"recipe": str(path), "output_dir": str(folder / name), **more}


def facts(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "facts.json").read_text())
    return found


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory) -> Path:
    """One launch of each world size; see the tests for what it shows."""
    folder: Path = tmp_path_factory.mktemp("runs")

    def of(**changes: Any) -> dict[str, Any]:
        content = recipe(data / "web.jsonl", **changes)
        del content["gradient_accumulation_steps"]
        return content

    mixed = {
        "data__sources": sources(data, 2, 1), "data__pack_samples": False,
        "data__mix_until": "all_exhausted", "global_batch_size": 8, "micro_batch_size": 2,
        "train_iters": 6, "data__max_length": 128,
    }  # fmt: skip
    plain = of(**{**mixed, "micro_batch_size": 8}, data__balance=False)
    even = of(**mixed)
    budget = of(**mixed, data__max_tokens_per_batch=160)
    every = of(**mixed, train_log_iter_interval=3)
    zero = of(**mixed, data__max_tokens_per_batch=160, deepspeed__zero_optimization__stage=3)
    stream = of(
        data__sources=sources(data, 2, 1), data__streaming=True, data__streaming_window=9,
        global_batch_size=4, micro_batch_size=2, train_iters=8, data__max_length=128,
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 3}], eval_at_end=True,
        data__eval_sources=[str(data / "few.jsonl")],
    )  # fmt: skip
    drive(
        [
            job(folder, "plain", plain),
            job(folder, "every", every),
            job(folder, "budget-1", budget),
            job(folder, "stream", stream),
            job(folder, "stream-cut", stream, overrides=["exit_iteration_this_run=4"]),
            job(folder, "stream-cut", stream, resume="step-3"),
            job(folder, "stream-ranks", stream, overrides=["exit_iteration_this_run=3"]),
        ],
        ranks=1, folder=folder,
    )  # fmt: skip
    drive(
        [
            job(folder, "even", even),
            job(folder, "budget-2", budget),
            job(folder, "zero", zero),
            job(folder, "stream-2", stream),
            job(folder, "stream-ranks", stream, resume="latest"),
        ],
        ranks=2, folder=folder,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["budget-1", "even", "budget-2", "zero"])
def test_a_division_changes_nothing_but_rounding(runs: Path, name: str) -> None:
    """Balanced micro-batches, token budgets, two ranks, ZeRO 3: the numbers of one micro-batch of
    eight rows on one rank."""
    assert facts(runs, name)["samples"] == facts(runs, "plain")["samples"]
    for one, other in zip(train_lines(runs / "plain"), train_lines(runs / name), strict=True):
        for key in ("loss", "grad_norm", WEB, CODE):
            assert (key in one) == (key in other)
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=2e-4), key
        for key in ("tokens", "tokens/web.jsonl", "tokens/code", "samples_seen", "epoch"):
            assert other.get(key) == one.get(key)


def test_sources_add_up(runs: Path) -> None:
    """Each source's mean over its own tokens; together they are the loss."""
    found = train_lines(runs / "even")
    assert all(line.keys() >= {"loss", WEB, "tokens/web.jsonl"} for line in found)
    assert any("tokens/code" in line for line in found)
    for line in found:
        counts = {name: line.get(f"tokens/{name}", 0) for name in ("web.jsonl", "code")}
        assert sum(counts.values()) == line["tokens"]
        total = sum(count * line[f"loss/{name}"] for name, count in counts.items() if count)
        assert total / line["tokens"] == pytest.approx(line["loss"], rel=1e-6)
        # a source without a token says nothing
        assert {f"loss/{n}" for n, count in counts.items() if not count}.isdisjoint(line)


def test_a_line_of_several_steps_has_their_sums(runs: Path) -> None:
    each, every = train_lines(runs / "plain"), train_lines(runs / "every")
    assert len(every) == 2
    for number, line in enumerate(every):
        steps = each[3 * number : 3 * number + 3]
        for name in ("web.jsonl", "code"):
            count = sum(step.get(f"tokens/{name}", 0) for step in steps)
            assert line[f"tokens/{name}"] == count
            total = sum(
                s[f"tokens/{name}"] * s[f"loss/{name}"] for s in steps if f"loss/{name}" in s
            )
            assert line[f"loss/{name}"] == pytest.approx(total / count, rel=1e-4)


def test_a_stream_resumes_to_the_bit(runs: Path) -> None:
    assert facts(runs, "stream-cut")["final"] == facts(runs, "stream")["final"]
    assert without_clocks(runs / "stream-cut") == without_clocks(runs / "stream")
    state = json.loads((runs / "stream" / "checkpoints" / "step-6" / "run.json").read_text())[
        "data"
    ]
    assert state["block"] > 0, "it went on from a block in the middle"
    assert state["samples"] <= 24
    assert len(json.dumps(state)) < 600


def test_a_stream_is_the_same_at_any_number_of_ranks(runs: Path) -> None:
    whole = facts(runs, "stream")["samples"]
    assert [s for step in whole for s in step] == list(range(32))
    assert facts(runs, "stream-2")["samples"] == whole
    assert facts(runs, "stream-ranks")["samples"] == whole[3:]
    for name in ("stream-2", "stream-ranks"):
        for one, other in zip(lines(runs / "stream"), lines(runs / name), strict=True):
            assert other["step"] == one["step"]
            for key in {"loss", "grad_norm", "eval/loss", WEB} & one.keys():
                assert other[key] == pytest.approx(one[key], rel=5e-4), key
            assert other.get("epoch") == one.get("epoch")


def test_a_stream_removes_what_it_passed(runs: Path) -> None:
    left = {int(p.name.removeprefix("block-")) for p in (runs / "stream/stream").glob("block-*")}
    assert min(left) > 3, "blocks of some three samples, and four steps of four may lie behind"


@pytest.mark.full
def test_a_stream_killed_while_it_prepares(tmp_path: Path, runs: Path) -> None:
    """kill -9 of everything while a block is being made; the run goes on to the same end."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        "from arctic_like.data import encoders\n"
        "plain = encoders.ConversationEncoder.__call__\n"
        "def slowly(self, rows):\n"
        "    time.sleep(0.3)\n"
        "    return plain(self, rows)\n"
        "encoders.ConversationEncoder.__call__ = slowly\n"
    )
    content = yaml.safe_load((runs / "stream.yaml").read_text())
    content["checkpoint"] = [{"type": "deepspeed", "save_every_n_steps": 1}]
    content["code"] = str(slow)
    path = write_recipe(tmp_path / "stream.yaml", content)
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "arctic_like.cli.main", str(path), f"output_dir={output}"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        saved = (output / "checkpoints" / "latest").exists()
        under_way = list(output.glob("stream/block-*/documents/*tmp*"))
        if saved and under_way:
            break
        assert process.poll() is None
        time.sleep(0.01)
    else:
        raise AssertionError("no block was ever under way")
    _kill_all(process.pid, output)
    process.wait()
    left = len(train_lines(output))
    assert 0 < left < 8
    done = subprocess.run(
        [sys.executable, "-m", "arctic_like.cli.main", "resume", str(output)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert without_clocks(output) == without_clocks(runs / "stream")


def _kill_all(pid: int, output: Path) -> None:
    """kill -9 of the command and of every process below it, at once."""
    listing = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    parents = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    family = {pid}
    while True:
        more = {child for child, parent in parents if parent in family} - family
        if not more:
            break
        family |= more
    for one in family:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert len(family) > 2, output
