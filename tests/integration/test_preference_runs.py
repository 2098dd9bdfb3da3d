"""Runs of pairs: the same at any stage, number of ranks and division, packed or not, resumed or not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .test_resume import counted, kill_when
from .tools import (
    CLOCKS,
    MODEL,
    WORDS,
    arctic_train,
    drive,
    lines,
    recipe,
    train_lines,
    write_recipe,
)

pytestmark = pytest.mark.full

METHODS: dict[str, dict[str, Any]] = {
    "sigmoid": {"type": "dpo", "loss": "sigmoid"},
    "ipo": {"type": "dpo", "loss": "ipo"},
    "aot": {"type": "dpo", "loss": {"aot": 1.0, "sft": 0.3}},
    "bco": {"type": "dpo", "loss": "bco_pair", "use_weighting": True},
    "orpo": {"type": "orpo"},
}
# name → stage, ranks, micro-batch size, packed
DIVISIONS = {"fine": (0, 1, 1, True), "two": (2, 2, 1, True), "three": (3, 2, 2, False)}
OTHER = {**MODEL, "num_hidden_layers": 1, "intermediate_size": 48}


def write_pairs(path: Path, *, count: int, seed: int = 0) -> Path:
    """Pairs whose answers differ in length by a factor of up to ten."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            one, other = (" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in range(2))
            row = {
                "prompt": f"{number} {draw.choice(WORDS)}?",
                "chosen": f"{one} yes",
                "rejected": other,
            }
            file.write(json.dumps(row) + "\n")
    return path


def write_data(folder: Path) -> Path:
    """Two files to train on and one to measure; the path of the first."""
    write_pairs(folder / "more.jsonl", count=4, seed=2)
    write_pairs(folder / "eval.jsonl", count=3, seed=1)
    return write_pairs(folder / "pairs.jsonl", count=7)


def content(data: Path, method: str, **changes: Any) -> dict[str, Any]:
    """A run whose every step has all pairs, so that packing changes no global batch; `aot` has two
    sources."""
    more = [str(data.with_name("more.jsonl"))] if method == "aot" else []
    own = {
        "data__sources": [str(data), *more],
        **METHODS[method], "data__type": "dpo", "data__max_length": 96, "data__pack_samples": False,
        "data__eval_sources": [str(data.with_name("eval.jsonl"))], "eval_interval": 1, "beta": 0.5,
        "global_batch_size": 64, "micro_batch_size": 4, "train_iters": 3,
        "optimizer__learning_rate": 1e-3,
    }  # fmt: skip
    made = recipe(data, **{**own, **changes})
    del made["gradient_accumulation_steps"]
    return made


def resumable(data: Path, method: str, **changes: Any) -> dict[str, Any]:
    """With dropout, steps of four pairs, and a checkpoint in the middle."""
    own = {
        "model__config": {**MODEL, "attention_dropout": 0.2}, "global_batch_size": 4,
        "micro_batch_size": 1, "train_iters": 6,
        "checkpoint": [{"type": "deepspeed", "save_every_n_steps": 3}],
    }  # fmt: skip
    return content(data, method, **{**own, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank and one of two, for all runs."""
    folder = tmp_path_factory.mktemp("preferences")
    data = write_data(folder)
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}

    def add(name: str, made: dict[str, Any], *, ranks: int = 1, **more: Any) -> None:
        path = write_recipe(folder / f"{name}.yaml", made)
        output = more.pop("output_dir", str(folder / name))
        jobs[ranks].append({"recipe": str(path), "output_dir": output, **more})

    for method in METHODS:
        add(f"{method}-whole", content(data, method))
        for name, (stage, ranks, micro, packed) in DIVISIONS.items():
            made = content(
                data, method, micro_batch_size=micro, data__pack_samples=packed,
                deepspeed__zero_optimization__stage=stage,
            )  # fmt: skip
            add(f"{method}-{name}", made, ranks=ranks)
    other = {"config": OTHER, "dtype": "fp32"}
    add("other-model", content(data, "sigmoid", ref_model=other))
    for ranks, stage in ((1, 0), (2, 3)):
        shared: dict[str, Any] = {
            "precompute_reference": True, "deepspeed__zero_optimization__stage": stage,
            "data__cache_dir": str(folder / f"cache-{ranks}"), "micro_batch_size": 3,
        }  # fmt: skip
        add(f"table-{ranks}", content(data, "sigmoid", **shared), ranks=ranks)
        add(
            f"other-table-{ranks}", content(data, "sigmoid", ref_model=other, **shared), ranks=ranks
        )
    adapted = {
        "model__peft_config": {"type": "lora", "r": 4, "lora_dropout": 0.0},
        "optimizer__learning_rate": 1e-2,
    }
    base = {"config": MODEL, "dtype": "fp32"}
    add("adapter-switched", content(data, "sigmoid", **adapted))
    add("adapter-beside", content(data, "sigmoid", ref_model=base, **adapted))
    add("adapter-table", content(data, "sigmoid", precompute_reference=True, **adapted))
    add("adapter-divided", content(data, "sigmoid", micro_batch_size=2, **adapted,
                                   deepspeed__zero_optimization__stage=3), ranks=2)  # fmt: skip
    for name, ranks, made in (
        ("aot", 2, resumable(data, "aot", deepspeed__zero_optimization__stage=2)),
        ("bco", 1, resumable(data, "bco", precompute_reference=True)),
    ):
        add(f"{name}-straight", made, ranks=ranks)
        add(f"{name}-stopped", {**made, "exit_iteration": 3}, ranks=ranks)
        add(f"{name}-resumed", made, ranks=ranks, output_dir=str(folder / f"{name}-stopped"),
            resume="latest")  # fmt: skip
    for ranks, listed in jobs.items():
        drive(listed, ranks=ranks, folder=folder)
    return folder


def series(run: Path, *keys: str) -> list[float]:
    """The values of some keys, line by line."""
    return [line[key] for line in lines(run) for key in keys if key in line]


def clockless(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in CLOCKS and not k.endswith("_per_second")}
        for line in lines(run)
    ]


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_however_it_is_divided(runs: Path, method: str, division: str) -> None:
    one, other = runs / f"{method}-whole", runs / f"{method}-{division}"
    assert len(train_lines(one)) == 3
    for key in ("loss", "grad_norm", "eval/loss"):
        expected = series(one, key)
        assert len(expected) > 1
        assert series(other, key) == pytest.approx(expected, rel=1e-5), key
    logged = {key for line in lines(one) for key in line} - CLOCKS
    shown = {key for key in logged if "/" in key or key == "kl"}
    assert len(shown) > 10
    for key in shown:
        assert series(other, key) == pytest.approx(series(one, key), rel=1e-4, abs=1e-6), key


def test_each_source_has_its_loss_and_its_pairs(runs: Path) -> None:
    for line in train_lines(runs / "aot-two"):
        assert (line["pairs/pairs.jsonl"], line["pairs/more.jsonl"]) == (7, 4)
        mean = (7 * line["loss/pairs.jsonl"] + 4 * line["loss/more.jsonl"]) / 11
        assert mean == pytest.approx(line["loss"], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_and_the_margin_grows(runs: Path, method: str) -> None:
    found = train_lines(runs / f"{method}-whole")
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"]


def test_at_the_first_step_the_policy_is_the_reference(runs: Path) -> None:
    """So DPO's loss is log 2 and no answer has a reward; with another model it is not."""
    first = train_lines(runs / "sigmoid-whole")[0]
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert (first["rewards/chosen"], first["kl"]) == (0.0, 0.0)
    assert abs(train_lines(runs / "other-model")[0]["rewards/chosen"]) > 0.01


@pytest.mark.parametrize(
    ("table", "model"),
    [
        ("table-1", "sigmoid-whole"),
        ("table-2", "sigmoid-whole"),
        ("other-table-1", "other-model"),
        ("other-table-2", "other-model"),
    ],
)
def test_a_precomputed_reference_is_the_model(runs: Path, table: str, model: str) -> None:
    for key in ("loss", "eval/loss"):
        assert series(runs / table, key) == pytest.approx(series(runs / model, key), rel=1e-6), key
    assert series(runs / table, "grad_norm") == pytest.approx(
        series(runs / model, "grad_norm"), rel=1e-5
    )


@pytest.mark.parametrize("other", ["adapter-beside", "adapter-table", "adapter-divided"])
def test_a_policy_without_its_adapter_is_its_reference(runs: Path, other: str) -> None:
    """As a base model beside it, as its own first weights, and parted over two ranks."""
    for key in ("loss", "eval/loss", "grad_norm"):
        expected = series(runs / "adapter-switched", key)
        assert series(runs / other, key) == pytest.approx(expected, rel=2e-6), key
    assert expected[0] != pytest.approx(expected[-1], rel=0.05)


@pytest.mark.parametrize("name", ["aot", "bco"])
def test_a_resumed_run_is_the_run_that_never_stopped(runs: Path, name: str) -> None:
    straight = clockless(runs / f"{name}-straight")
    assert len(straight) > 6
    assert clockless(runs / f"{name}-stopped") == straight
    digests = [
        json.loads((runs / f"{name}-{which}" / "facts.json").read_text())["final"]
        for which in ("straight", "stopped")
    ]
    assert digests[0] == digests[1]


def test_a_reference_is_in_no_checkpoint(runs: Path) -> None:
    facts = next((runs / "aot-straight" / "checkpoints").glob("step-*/run.json"))
    assert "reference" not in json.loads(facts.read_text())["recipe"]
    assert not list((runs / "aot-straight" / "checkpoints").rglob("*reference*"))


@pytest.mark.full
def test_a_killed_run_is_the_run_that_was_never_killed(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    made = resumable(data, "aot", precompute_reference=True)
    made["checkpoint"][0] |= {"auto_resume": True, "save_every_n_steps": 2}
    path = write_recipe(tmp_path / "recipe.yaml", made)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert arctic_train(str(path), f"output_dir={straight}", cwd=tmp_path).returncode == 0
    words = [str(path), f"output_dir={killed}"]
    command = [sys.executable, "-m", "arctic_like.cli.main", *words]
    kill_when(command, lambda: counted(killed) >= 4, run=killed, cwd=tmp_path)
    again = arctic_train(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert clockless(killed) == clockless(straight)


RECIPES = Path(__file__).parents[2] / "recipes" / "dpo"


def test_the_script_of_the_recipes_writes_their_data(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-I", "-S", str(RECIPES / "make_tiny.py"), str(tmp_path)], check=True
    )
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(path.name for path in RECIPES.glob("*.jsonl"))
    for name in written:
        assert (tmp_path / name).read_bytes() == (RECIPES / name).read_bytes()
    train, held_out = (
        (RECIPES / f"tiny_{name}pairs.jsonl").read_text() for name in ("", "heldout_")
    )
    prompts = [
        {json.loads(row)["prompt"] for row in text.splitlines()} for text in (train, held_out)
    ]
    assert not prompts[0] & prompts[1]


@pytest.mark.full
def test_the_recipes_move_the_win_rate(tmp_path: Path) -> None:
    """From almost none of the held-out questions to nine in ten."""
    copied = tmp_path / "recipes" / "dpo"
    shutil.copytree(RECIPES, copied)
    for name, output in (("tiny_sft", []), ("tiny", [f"output_dir={tmp_path / 'dpo'}"])):
        done = arctic_train(str(copied / f"{name}.yaml"), *output, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    rates = series(tmp_path / "dpo", "eval/win_rate")
    assert rates[0] < 0.2
    assert rates[-1] > 0.9
