"""Throughput, signs of life, traces, collections, snapshots of code: each against what it says it does."""

from __future__ import annotations

import gc
import gzip
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arctic_like import load_recipe, run
from arctic_like.callbacks.code_snapshot import is_hidden, without_secrets
from arctic_like.callbacks.histograms import distribution
from arctic_like.callbacks.lr_finder import smoothed, steepest
from arctic_like.callbacks.throughput import (
    Throughput,
    ThroughputConfig,
    documents,
    model_cost,
)
from tests.integration.tools import (
    environment,
    lines,
    recipe,
    train_lines,
    write_conversations,
    write_recipe,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data") / "data.jsonl", count=20)


def train(folder: Path, data: Path, *callbacks: dict[str, Any], **changes: Any) -> Path:
    """A run of a few steps in this process; its directory."""
    made = recipe(data, callbacks=list(callbacks), **changes)
    made["logger"] = {"level": "INFO"}
    path = write_recipe(folder / "recipe.yaml", made)
    run(load_recipe(path, []), output_dir=folder / "run")
    return folder / "run"


def llama(*, tied: bool = False) -> Any:
    shape = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


@pytest.mark.parametrize("tied", [True, False])
def test_the_cost_of_a_token_is_what_its_multiplications_cost(tied: bool) -> None:
    """Counted by torch's own counter of floating-point operations: forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    model, length = llama(tied=tied), 32
    model.config._attn_implementation = "eager"
    model.model.embed_tokens.weight.requires_grad_(True)
    ids = torch.randint(0, 100, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    cost = model_cost(model)
    assert cost is not None
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    matrices -= 0 if tied else model.model.embed_tokens.weight.numel()
    norms = cost.parameters - matrices
    assert 0 <= norms <= 8 * 7  # vectors: the formula counts them, torch does not
    ours = cost.flops(2 * length, 2 * length**2) - 6 * norms * 2 * length
    # the first layer's inputs need a gradient as well: the embeddings are trained
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_tokens_of_documents_without_padding() -> None:
    positions = [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]]
    labels = [[-100, 5, 5, -100, 5, -100, -100, -100], [-100] * 8]
    batch = {"position_ids": torch.tensor(positions), "labels": torch.tensor(labels)}
    assert documents(batch) == (5.0, 9.0 + 4.0)


def test_rates_are_sums_over_the_window(data: Path) -> None:
    callback = Throughput(ThroughputConfig(window=2, peak_flops="1M"))
    now = [0.0]
    callback._clock = lambda: now[0]
    callback._model, callback._peak = model_cost(llama()), 1e6
    positions, labels = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.long)
    micro = SimpleNamespace(
        idle=False, samples=[0], data={"position_ids": positions, "labels": labels}
    )
    trainer = SimpleNamespace(
        batch=SimpleNamespace(micro_batches=[micro, SimpleNamespace(idle=True)]), device="cpu",
        world=SimpleNamespace(size=2, counts=True), sum_over_ranks=lambda values: [2 * v for v in values],
    )  # fmt: skip
    for seconds in (100.0, 3.0, 5.0):  # the first falls out of the window
        callback.on_step_start(trainer)
        now[0] += seconds
        callback.on_step_end(trainer)
        now[0] += 50  # an evaluation: not counted
    values: dict[str, Any] = {}
    callback.on_log(trainer, values)
    flops = 2 * 2 * callback._model.flops(6, 36) / 8
    assert values == pytest.approx({
        "throughput/samples_per_second": 4 / 8, "throughput/document_tokens_per_second": 24 / 8,
        "throughput/flops_per_second": flops, "mfu": flops / 2e6,
    })  # fmt: skip


def test_one_run_with_many(tmp_path: Path, data: Path) -> None:
    """Trace, table, heartbeat, collections, code and values in one run; nothing changes its losses."""
    plain = train(tmp_path / "plain", data, train_iters=6)
    was = gc.isenabled()
    seen: list[int] = []
    gc.callbacks.append(
        lambda phase, info: seen.append(info["generation"]) if phase == "start" else None
    )
    try:
        many = train(
            tmp_path / "many", data, {"type": "throughput", "peak_flops": "1G"},
            {"type": "profiler", "wait": 1, "warmup": 1, "active": 2, "rows": 3},
            {"type": "heartbeat", "every": 0}, {"type": "watchdog", "timeout": 60},
            {"type": "gc_control", "every_n_steps": 2, "generation": 1},
            {"type": "code_snapshot"}, {"type": "cuda_memory"},
            train_iters=6,
        )  # fmt: skip
    finally:
        gc.callbacks.pop()
    assert [x["loss"] for x in train_lines(many)] == [x["loss"] for x in train_lines(plain)]
    assert gc.isenabled() == was
    assert gc.get_freeze_count() == 0
    assert seen.count(1) >= 3
    assert all(line["mfu"] > 0 for line in train_lines(many))
    (trace,) = (many / "profile").iterdir()
    assert trace.name == "rank-0-step-4.json.gz"
    with gzip.open(trace) as file:
        names = {e.get("name") for e in json.load(file)["traceEvents"]}
    assert {"train step 3", "train step 4"} <= names
    assert not {"train step 2", "train step 5"} & names
    beat = json.loads((many / "heartbeat.json").read_text())
    assert (beat["step"], beat["moment"]) == (6, "end")
    assert abs(time.time() - beat["time"]) < 120
    assert (many / "code" / "recipe.yaml").read_text() == (
        tmp_path / "many/recipe.yaml"
    ).read_text()
    log = (many / "logs" / "rank-0.log").read_text()
    assert "Self CPU" in log
    assert "cuda_memory has nothing to record" in log
    assert not list((many / "logs").glob("stacks*"))


HANGS = """
import time
from arctic_like.callbacks.base import Callback, CallbackConfig

class Hangs(Callback):
    name = "hangs"
    config_type = CallbackConfig

    def on_evaluate_start(self, trainer):
        time.sleep(3)

    def on_step_start(self, trainer):
        if trainer.global_step == 3:
            self.a_place_that_hangs()

    def a_place_that_hangs(self):
        time.sleep(60)
"""


def test_the_watchdog_tells_where_it_hangs_and_ends_the_run(tmp_path: Path, data: Path) -> None:
    """Not in the evaluation, which takes longer than the limit."""
    (tmp_path / "hangs.py").write_text(HANGS)
    made = recipe(
        data, train_iters=5, code=str(tmp_path / "hangs.py"), eval_interval=2,
        data__train_eval_split=[0.8, 0.2],
        callbacks=[{"type": "watchdog", "timeout": 2, "abort": True}, {"type": "hangs"}],
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", made)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "arctic_like.cli.main", str(path), f"output_dir={tmp_path / 'run'}"],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - begun < 55
    assert "after step 3" in done.stderr
    assert "aborted by the watchdog" in done.stderr
    stacks = (tmp_path / "run/logs/stacks-rank-0.txt").read_text()
    assert "a_place_that_hangs" in stacks
    assert stacks.count("no step has ended") == 1
    assert len(train_lines(tmp_path / "run")) == 3


def test_secrets_do_not_reach_the_snapshot(tmp_path: Path, data: Path) -> None:
    secrets = ["hf_" + "a1B2" * 8, "sk-" + "x9" * 16, "ghp_" + "Zz09" * 8, "AKIA" + "ABCD" * 4]
    text = "\n".join([
        *(f"call({secret!r})" for secret in secrets), 'api_key = "0123456789abcdef"',
        "WANDB_API_KEY: 0123456789abcdef0123", "password='hunter2hunter2'",
        "url: postgres://me:swordfish@host/db",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
    ])  # fmt: skip
    kept = without_secrets(text)
    for secret in (*secrets, "0123456789abcdef", "hunter2", "swordfish", "MIIEow"):
        assert secret not in kept
    plain = "max_new_tokens: 64\ntokens = batch['input_ids']\nmax_tokens_per_batch: 1000\nlr: 1e-4"
    assert without_secrets(plain) == plain
    assert is_hidden("deploy/.env.production")
    assert is_hidden("secrets/a.py")
    assert not is_hidden("train.py")

    folder = tmp_path / "work"
    folder.mkdir()

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("mine.py", "server.key", "big.txt"):
        (folder / name).write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    (folder / "mine.py").write_text(f"a = 2\nkey = '{secrets[0]}'\n")
    (folder / "server.key").write_text("0123456789abcdef\n")
    (folder / "big.txt").write_text("line\n" * 4000)
    made = recipe(data, train_iters=1, code=str(folder / "mine.py"),
                  callbacks=[{"type": "code_snapshot", "max_bytes": 3000}])  # fmt: skip
    run(load_recipe(write_recipe(folder / "r.yaml", made), []), output_dir=tmp_path / "run")
    code = tmp_path / "run/code"
    assert {p.name for p in code.iterdir()} == {"r.yaml", "mine.py", "git.txt", "changes.diff"}
    diff = (code / "changes.diff").read_text()
    assert "cut after 3000 bytes" in diff
    assert all(p.stat().st_size < 3100 for p in code.iterdir())
    together = "".join(p.read_text() for p in code.iterdir())
    assert secrets[0] not in together
    assert "0123456789abcdef" not in together
    assert "a = 2" in (code / "mine.py").read_text()


def test_a_distribution_is_numpys() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3 + 1
    spoiled = torch.cat([values, torch.tensor([float("nan"), float("inf")])])
    found, array = distribution(spoiled, bins=10), values.double().numpy()
    counts, edges = np.histogram(array, bins=10)
    assert found.non_finite == 2
    assert sum(found.counts) == 500
    assert max(abs(np.array(found.counts) - counts)) <= 1  # a value on an edge
    assert found.edges == pytest.approx(edges)
    assert (found.mean, found.std) == pytest.approx((array.mean(), array.std()))
    assert found.norm == pytest.approx(np.linalg.norm(array))
    assert distribution(torch.zeros(3), bins=3).counts == [0, 3, 0]


def test_the_finder_suggests_where_the_loss_falls_fastest(tmp_path: Path, data: Path) -> None:
    rates = [10 ** (-6 + i / 10) for i in range(60)]
    falls = [1 / (1 + (rate / 1e-3)) + (rate > 0.1) * 5 for rate in rates]
    assert steepest(rates, falls) == pytest.approx(1e-3, rel=0.2)
    assert steepest(rates, [1.0 + rate for rate in rates]) is None
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    find = {"type": "lr_finder", "start": 1e-4, "end": 1.0, "steps": 20, "then": "use"}
    used = train(tmp_path / "use", data, find, train_iters=4, scheduler__warmup_ratio=0.0)
    log = (used / "logs/rank-0.log").read_text()
    suggested = float(log.partition("learning rate of ")[2].split(";")[0])
    found = [line["learning_rate"] for line in train_lines(used)]
    shape = [0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    assert found == pytest.approx([suggested * s for s in shape], rel=0.01)
    stopped = train(tmp_path / "stop", data, {**find, "then": "stop"}, train_iters=4)
    assert train_lines(stopped) == []


def test_lines_of_histograms_stand_beside_the_others(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("tensorboard")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    folder = train(
        tmp_path, data, {"type": "histograms", "every_n_steps": 2, "match": "q_proj"},
        train_iters=4, trackers=[{"type": "tensorboard"}],
    )  # fmt: skip
    found = [line for line in lines(folder) if any("q_proj" in key for key in line)]
    assert [line["step"] for line in found] == [2, 4]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    name = "gradients/model.layers.0.self_attn.q_proj.weight"
    (first, _) = events.Histograms(name)
    assert first.step == 2
    assert first.histogram_value.num == 32 * 32


def test_what_is_frozen_stays_where_weights_are_their_own_masters(
    tmp_path: Path, data: Path
) -> None:
    """One rank in fp32 at ZeRO 2: the module's weights are views of the flat tensor that is updated."""
    freeze = {"type": "freeze", "match": ["q_proj", "norm"], "after": 1, "until": 3}
    folder = train(
        tmp_path, data, freeze, {"type": "watch_frozen"}, train_iters=4,
        deepspeed__zero_optimization__stage=2,
        code=str(Path(__file__).with_name("watching.py")),
    )  # fmt: skip
    moved = [set(names) for names in json.loads((folder / "moved.json").read_text())]
    frozen = {name for name in moved[0] if "q_proj" in name or "norm" in name}
    assert frozen
    assert moved == [moved[0], moved[0] - frozen, moved[0] - frozen, moved[0]]
