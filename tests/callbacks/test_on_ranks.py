"""Shipped callbacks on two ranks at every stage, against one rank and against runs without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import (
    drive,
    lines,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

pytestmark = pytest.mark.full

STAGES = (0, 2, 3)
FREEZE = {"0-fp32": (0, "fp32"), "0-bf16": (0, "bf16"), "1-bf16": (1, "bf16"),
          "2-fp32": (2, "fp32"), "3-fp32": (3, "fp32"), "3-bf16": (3, "bf16")}  # fmt: skip
FROZEN = ("embed_tokens", "layers.0.", "norm")
STEPS = 6
PROMPTS = ["ice?", "1 snow", "what", "a seal", "12 floe?"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("callbacks")
    data = write_conversations(folder / "data.jsonl", count=24)
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def add(name: str, ranks: int, stage: int, *callbacks: dict[str, Any], **changes: Any) -> None:
        made = recipe(
            data, train_iters=STEPS, global_batch_size=4,
            deepspeed={"zero_optimization": {"stage": stage}, "gradient_clipping": 0.5},
            callbacks=list(callbacks), code=str(Path(__file__).with_name("watching.py")), **changes,
        )  # fmt: skip
        del made["gradient_accumulation_steps"]
        path = write_recipe(folder / f"{name}.yaml", made)
        jobs[ranks].append({"recipe": str(path), "output_dir": str(folder / name)})

    noise = {"type": "neftune", "alpha": 50}
    freeze = {"type": "freeze", "match": list(FROZEN), "after": 2, "until": 4}
    look = {"type": "histograms", "every_n_steps": 3, "match": "q_proj|norm", "bins": 8}
    ask = {"type": "generate_samples", "prompts": PROMPTS, "batch_size": 2, "max_new_tokens": 12,
           "temperature": 1.0}  # fmt: skip
    find = {"type": "lr_finder", "start": 1e-5, "end": 1e3, "steps": 12, "then": "continue"}
    split = {"eval_at_start": True, "data__train_eval_split": [0.8, 0.2]}
    add("noise-one", 1, 0, noise)
    add("plain-one", 1, 0)
    add("look-one", 1, 0, look)
    add("ask-one", 1, 0, ask, **split)
    add("silent-one", 1, 0, **split)
    add("freeze-one", 1, 0, freeze)
    add("noise-two", 2, 2, noise)
    add("look-two", 2, 3, look)
    add("ask-two", 2, 3, ask, **split)
    for name, (stage, dtype) in FREEZE.items():
        add(f"freeze-{name}", 2, stage, freeze, {"type": "watch_frozen"}, model__dtype=dtype)
    for stage in STAGES:
        add(f"plain-{stage}", 2, stage)
        add(f"find-{stage}", 2, stage, find)
    for ranks, listed in jobs.items():
        drive(listed, ranks=ranks, folder=folder, timeout=600)
    return folder


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in train_lines(run)]


def test_noise_does_not_depend_on_ranks_and_is_there(runs: Path) -> None:
    one, two = losses(runs / "noise-one"), losses(runs / "noise-two")
    assert two == pytest.approx(one, rel=1e-5)
    assert one[0] != pytest.approx(losses(runs / "plain-one")[0], rel=1e-3)


@pytest.mark.parametrize("name", FREEZE)
def test_frozen_parameters_stay_to_the_bit_and_all_others_move(runs: Path, name: str) -> None:
    moved = json.loads((runs / f"freeze-{name}" / "moved.json").read_text())
    everything = set(moved[0])
    frozen = {n for n in everything if any(part in n for part in FROZEN)}
    assert len(frozen) > 5
    assert [set(names) for names in moved] == [
        everything, everything, everything - frozen, everything - frozen, everything, everything
    ]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in FREEZE if n.endswith("fp32")])
def test_a_freeze_is_the_same_at_every_stage(runs: Path, name: str) -> None:
    one, two = train_lines(runs / "freeze-one"), train_lines(runs / f"freeze-{name}")
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-4)
    plain = [line["grad_norm"] for line in train_lines(runs / "plain-one")]
    assert one[1]["grad_norm"] == plain[1]
    assert one[2]["grad_norm"] < 0.95 * plain[2], "what is frozen does not count in the norm"


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_remains_of_the_finder(runs: Path, stage: int) -> None:
    assert without_clocks(runs / f"find-{stage}") == without_clocks(runs / f"plain-{stage}")
    facts = [
        json.loads((runs / f"{n}-{stage}" / "facts.json").read_text()) for n in ("find", "plain")
    ]
    assert facts[0]["final"] == facts[1]["final"]
    table = (runs / f"find-{stage}" / "lr_finder.csv").read_text().splitlines()
    rates = [float(row.split(",")[0]) for row in table[1:]]
    assert table[0] == "learning_rate,loss,smoothed_loss"
    assert len(rates) >= 5
    factor = 1e8 ** (1 / 11)
    assert rates == pytest.approx([1e-5 * factor**i for i in range(len(rates))])


def test_histograms_of_shared_weights_are_those_of_whole_ones(runs: Path) -> None:
    one, two = (
        [line for line in lines(runs / f"look-{n}") if any(k.startswith("weights/") for k in line)]
        for n in ("one", "two")
    )
    assert [line["step"] for line in one] == [3, 6]
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        assert all("q_proj" in k or "norm" in k for k in mine if "/" in k)
        for key, value in mine.items():
            assert theirs[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key


def test_what_is_generated_depends_on_no_rank_and_changes_nothing(runs: Path) -> None:
    texts = []
    for name in ("ask-one", "ask-two"):
        log = (runs / name / "logs" / "rank-0.log").read_text()
        texts.append(log.partition("samples at step 0\n")[2].partition("\n2026")[0][:4000])
    one, two = ([line for line in t.splitlines() if line.startswith("  ")] for t in texts)
    assert one == two
    assert [line.split(None, 1)[1] for line in one if line.startswith("  prompt")] == PROMPTS
    assert losses(runs / "ask-one") == losses(runs / "silent-one")
