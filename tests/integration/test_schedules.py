"""Learning rates of real runs against closed forms, on one rank and two, at every ZeRO stage, and after
a resume; optimizers by dotted path, schedule-free ones too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from arctic_like import load_recipe
from arctic_like.errors import RecipeError

from .tools import (
    arctic_train,
    drive,
    lines,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

pytestmark = pytest.mark.full

STEPS, RATE = 20, 3e-3
PER_EPOCH = 4
"""56 training rows in global batches of 16 (the last has 8)."""
TORCH = "torch.optim.lr_scheduler"
STAGES = (0, 2, 3)
"""Of whole runs on two ranks; the one that moves from two to one and back is at stage 1 and 3."""

GROUPS: list[dict[str, Any]] = [
    {"match": "embed|lm_head", "name": "vocabulary", "lr": 1e-3, "weight_decay": 0},
    {"match": r"layers\.0\..*q_proj", "name": "wsd", "betas": [0.8, 0.95],
     "scheduler": {"type": "wsd", "warmup_steps": 3, "decay_steps": 6, "decay_shape": "linear"}},
    {"match": r"layers\.0\..*k_proj", "name": "floor", "lr": 2e-3,
     "scheduler": {"type": "cosine_with_floor", "warmup_ratio": "20%", "min_lr_ratio": 0.2}},
    {"match": r"layers\.0\..*v_proj", "name": "plateau", "lr": 4e-3,
     "scheduler": {"type": "plateau", "patience": 0, "factor": 0.5, "threshold": 0.02}},
    {"match": r"layers\.0\.mlp", "name": "epochs",
     "scheduler": {"type": f"{TORCH}.ExponentialLR", "gamma": 0.7, "interval": "epoch"}},
    {"match": r"layers\.1\.mlp", "name": "cycle",
     "scheduler": {"type": f"{TORCH}.OneCycleLR", "max_lr": 3e-3}},
    {"match": "norm", "name": "still", "lr": 0, "scheduler": {"type": "wsd", "warmup_steps": 0}},
]  # fmt: skip


def torchs(name: str, rate: float, **stated: Any) -> list[float]:
    """torch's own schedule in a plain loop."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = getattr(lr_scheduler, name)(optimizer, **stated)
    seen = []
    for _ in range(STEPS):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def plateau(run: Path, rate: float) -> list[float]:
    """torch's own, fed with the run's own evaluations: the rate of each step."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.02)
    measured = {line["step"]: line["eval/loss"] for line in lines(run) if "eval/loss" in line}
    assert len(measured) >= 6
    seen = []
    for step in range(1, STEPS + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        if step in measured:
            scheduler.step(measured[step])
    return seen


def expected(run: Path) -> dict[str, list[float]]:
    """The closed form of every rate in a train line, for the steps s = 0 … STEPS - 1."""
    steps = range(STEPS)
    # the recipe's own: transformers' cosine, 2 steps of warm-up from 0
    cosine = [
        s / 2 if s < 2 else (1 + math.cos(math.pi * (s - 2) / (STEPS - 2))) / 2 for s in steps
    ]
    return {
        "learning_rate": [RATE * f for f in cosine],
        "learning_rate/vocabulary": [1e-3 * f for f in cosine],
        "learning_rate/wsd": [
            RATE * ((s + 1) / 4 if s < 3 else min(1, 1 - (s - (STEPS - 6) + 1) / 7)) for s in steps
        ],
        "learning_rate/floor": [
            2e-3 * ((s + 1) / 5 if s < 4 else 0.2 + 0.4 * (1 + math.cos(math.pi * (s - 4) / 15)))
            for s in steps
        ],
        "learning_rate/plateau": plateau(run, 4e-3),
        "learning_rate/epochs": [RATE * 0.7 ** (s // PER_EPOCH) for s in steps],
        "learning_rate/cycle": torchs("OneCycleLR", RATE, max_lr=3e-3, total_steps=STEPS),
        "learning_rate/still": [0.0 for _ in steps],
    }


class Runs:
    """All runs of this file, made by a few launches."""

    def __init__(self, folder: Path, *, whole: bool) -> None:
        self.folder = folder
        data = write_conversations(folder / "data.jsonl", count=70)
        self.content = recipe(
            data, train_iters=STEPS, micro_batch_size=4, global_batch_size=16,
            data__pack_samples=False, data__train_eval_split=[0.8, 0.2], eval_interval=3,
            optimizer__learning_rate=RATE, optimizer__groups=GROUPS,
            checkpoint=[{"type": "deepspeed"}],
        )  # fmt: skip
        del self.content["gradient_accumulation_steps"]
        self.free = {
            **self.content, "train_iters": 8, "eval_interval": 1,
            "optimizer": {"type": "schedule_free.ScheduleFreeSGD", "lr": 0.3, "groups": [
                {"match": "embed", "lr": 0.1, "beta": 0.8}]},
            "scheduler": {"type": "wsd", "warmup_steps": 2, "decay_steps": 0},
            "checkpoint": [{"type": "deepspeed", "save_end_of_training": True},
                           {"type": "huggingface", "save_every_n_steps": 5,
                            "save_end_of_training": True}],
        }  # fmt: skip
        self.sgd = {
            **self.content,
            "optimizer": {"type": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9,
                          "nesterov": True, "groups": [{"match": "embed", "momentum": 0.5}]},
        }  # fmt: skip
        self.any: dict[str, Any] = {}
        two = [self.job(f"two-{stage}", stage) for stage in (STAGES if whole else (2, 3))]
        two += [self.job("again-2", 2, "exit_iteration=11")]
        moving = (1, 3) if whole else ()
        two += [self.job(f"moving-{s}", s, "exit_iteration=7") for s in moving]
        two += [self.job(f"sgd-{stage}", stage, of="sgd") for stage in ((2, 3) if whole else (3,))]
        two += [self.job(f"free-{s}", s, of="free") for s in ((0, 2) if whole else (2,))]
        two += [self.job("free-again", 2, "exit_iteration=3", of="free")]
        drive(two, ranks=2, folder=folder)
        one = [self.job("one", 0), self.job("sgd-one", 0, of="sgd")]
        one += [self.job(f"moving-{s}", s, "exit_iteration=13", resume="latest") for s in moving]
        one += [self.job("free-one", 0, of="free")]
        one += [self.job("free-unseen", 0, "eval_interval=0", "checkpoint=[]", of="free")]
        if whole:
            one += [self.job(f"free-bf16-{s}", s, "model.dtype=bf16", of="free") for s in (0, 1, 2)]
        drive(one, ranks=1, folder=folder)
        last = [self.job("again-2", 2, resume="latest")]
        last += [self.job(f"moving-{s}", s, resume="latest") for s in moving]
        last += [self.job("free-again", 2, resume="latest", of="free")]
        drive(last, ranks=2, folder=folder)

    def job(
        self, name: str, stage: int, *overrides: str, resume: str = "", of: str = "content"
    ) -> dict[str, Any]:
        path = write_recipe(self.folder / f"{of}.yaml", getattr(self, of))
        return {
            "recipe": str(path),
            "output_dir": str(self.folder / name),
            "overrides": [f"deepspeed.zero_optimization.stage={stage}", *overrides],
            "resume": resume,
        }

    def facts(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "facts.json").read_text()))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With the runs of the full matrix only where a test of it was chosen."""
    whole = any(
        item.get_closest_marker("full") and Path(item.path) == Path(__file__)
        for item in request.session.items
    )
    return Runs(tmp_path_factory.mktemp("schedules"), whole=whole)


def full(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize(
    "name",
    ["one", "two-2", "two-3", "again-2", *map(full, ("two-0", "moving-1", "moving-3"))],
)
def test_every_rate_is_its_closed_form_at_every_step(runs: Runs, name: str) -> None:
    """Groups by pattern; every registered schedule and two by path; by step, epoch and metric. `again` was
    stopped and resumed, `moving` went from two ranks to one and back."""
    found = train_lines(runs.folder / name)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    forms = expected(runs.folder / name)
    assert forms.keys() == {key for key in found[0] if key.startswith("learning_rate")}
    for key, rates in forms.items():
        assert [line[key] for line in found] == pytest.approx(rates, rel=1e-9, abs=1e-15), key
    assert len(set(forms["learning_rate/plateau"])) > 2  # it did fall


@pytest.mark.parametrize("name", ["two-2", "two-3", *map(full, ("two-0", "moving-1", "moving-3"))])
def test_groups_train_the_same_at_every_stage(runs: Runs, name: str) -> None:
    pairs = zip(train_lines(runs.folder / name), train_lines(runs.folder / "one"), strict=True)
    for line, other in pairs:
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(other[key], rel=2e-5), (line["step"], key)


def test_a_resume_is_the_run_that_never_stopped(runs: Runs) -> None:
    for again, straight in (("again-2", "two-2"), ("free-again", "free-2")):
        folder = runs.folder
        assert without_clocks(folder / again) == without_clocks(folder / straight), again
        assert runs.facts(again)["final"] == runs.facts(straight)["final"], again


@pytest.mark.parametrize("stage", [full(2), 3])
def test_a_dotted_optimizer_is_the_same_at_every_stage(runs: Runs, stage: int) -> None:
    one = train_lines(runs.folder / "sgd-one")
    assert one[-1]["loss"] < one[0]["loss"] - 0.1
    for line, other in zip(train_lines(runs.folder / f"sgd-{stage}"), one, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-5), line["step"]


def evaluations(run: Path) -> list[float]:
    return [line["eval/loss"] for line in lines(run) if "eval/loss" in line]


@pytest.mark.parametrize("stage", [full(0), 2])
def test_schedule_free_is_evaluated_at_its_average(runs: Runs, stage: int) -> None:
    one, two = runs.folder / "free-one", runs.folder / f"free-{stage}"
    assert len(evaluations(one)) == 8
    assert evaluations(two) == pytest.approx(evaluations(one), rel=2e-5)
    assert [line["loss"] for line in train_lines(two)] == pytest.approx(
        [line["loss"] for line in train_lines(one)], rel=2e-5
    )


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_schedule_free_in_low_precision(runs: Runs, stage: int) -> None:
    """Each stage keeps its fp32 weights elsewhere (0: each parameter's; 1: BF16_Optimizer). At the weights
    it trains with, the evaluation would be off by up to 2.6e-2; rounding the activations is 2e-3 (bf16 has
    8 bits, 4e-3 at most for one number)."""
    plain, other = runs.folder / "free-one", runs.folder / f"free-bf16-{stage}"
    assert evaluations(other) == pytest.approx(evaluations(plain), rel=4e-3)


def test_an_evaluation_and_an_export_change_no_step(runs: Runs) -> None:
    def losses(name: str) -> list[float]:
        return [line["loss"] for line in train_lines(runs.folder / name)]

    assert losses("free-unseen") == losses("free-one")
    assert runs.facts("free-unseen")["final"] == runs.facts("free-one")["final"]


def test_what_is_exported_is_the_average(runs: Runs) -> None:
    """x = (y - (1 - β) z) / β, from the y and z of the checkpoint at the same step."""
    from transformers import AutoModelForCausalLM

    run = runs.folder / "free-one"
    exported = AutoModelForCausalLM.from_pretrained(run / "exports" / "step-8").state_dict()
    saved = run / "checkpoints" / "step-8" / "engine" / "mp_rank_00_model_states.pt"
    content = torch.load(saved, weights_only=False)
    trained, optimizer = content["module"], content["optimizer"]
    embedding = "model.embed_tokens.weight"
    others = [name for name in trained if name != embedding]
    order = [*sorted(others, key=lambda name: -trained[name].ndim), embedding]
    moved = 0
    for number, name in enumerate(order):
        beta = 0.8 if name == embedding else 0.9
        y, z = trained[name], optimizer["state"][number]["z"]
        torch.testing.assert_close(exported[name], (y - (1 - beta) * z) / beta)
        moved += int(not torch.equal(exported[name], y))
    assert moved == len(order) == len(exported)


ALL = {
    "Adam": {"lr": 3e-3}, "NAdam": {"lr": 3e-3}, "RAdam": {"lr": 3e-3}, "Adamax": {"lr": 3e-3},
    "Adadelta": {"lr": 1.0}, "RMSprop": {"lr": 1e-3}, "Rprop": {"lr": 1e-4}, "ASGD": {"lr": 0.1},
}  # fmt: skip


@pytest.mark.full
def test_every_elementwise_optimizer_of_torch_at_every_stage(runs: Runs) -> None:
    def job(name: str, kind: str, stage: int) -> dict[str, Any]:
        runs.any = {**runs.content, "train_iters": 8, "checkpoint": []}
        runs.any["optimizer"] = {"type": f"torch.optim.{kind}", **ALL[kind]}
        job = runs.job(name, stage, of="any")
        path = write_recipe(runs.folder / f"{name}.yaml", runs.any)
        return {**job, "recipe": str(path)}

    drive([job(f"{k}-one", k, 0) for k in ALL], ranks=1, folder=runs.folder)
    drive([job(f"{k}-{s}", k, s) for k in ALL for s in (1, 2, 3)], ranks=2, folder=runs.folder)
    for kind in ALL:
        one = [line["loss"] for line in train_lines(runs.folder / f"{kind}-one")]
        for stage in (1, 2, 3):
            two = [line["loss"] for line in train_lines(runs.folder / f"{kind}-{stage}")]
            assert two == pytest.approx(one, rel=1e-4), (kind, stage)


def test_a_schedule_that_would_never_move_is_refused_at_validation(runs: Runs) -> None:
    for changes in (
        {"scheduler": {"type": "plateau"}},
        {"scheduler": {"type": "wsd"}},  # the group's own is a plateau
    ):
        with pytest.raises(RecipeError, match="eval_interval is off"):
            load_recipe({**runs.content, **changes, "eval_interval": 0})


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"optimizer": {"groups": [{"match": "nothing_here"}]}},
         ["optimizer.groups.0.match", "model.embed_tokens.weight"]),
        ({"scheduler": {"type": "plateau"}, "optimizer": {}}, ["no evaluation data"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(
    runs: Runs, tmp_path: Path, changes: dict[str, Any], sentences: list[str]
) -> None:
    content = {**runs.content, **changes}
    if "scheduler" in changes:
        content["data"] = {k: v for k, v in content["data"].items() if k != "train_eval_split"}
    path = write_recipe(tmp_path / "recipe.yaml", content)
    done = arctic_train(str(path), f"output_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for sentence in sentences:
        assert sentence in done.stderr
