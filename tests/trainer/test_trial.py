"""What is tried before a run goes on otherwise divided leaves no trace; what is tried is the longest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.checkpoint.reading import read_weights
from arctic_like.errors import RunError
from arctic_like.stop import StopRequest
from arctic_like.trainer import trial
from arctic_like.world import World
from tests.integration.tools import (
    drive,
    lines,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("trial") / "data.jsonl", count=40)


def go(path: Path, run: Path, *overrides: str, resume: str = "") -> None:
    execute(load_recipe(path, overrides), output_dir=run, resume=resume, stop=StopRequest())


def derived(data: Path, **changes: Any) -> dict[str, Any]:
    """The tiny recipe, its accumulation derived."""
    made = recipe(data, **changes)
    del made["gradient_accumulation_steps"]
    return made


def cut(folder: Path, data: Path, **changes: Any) -> Path:
    """A run of eight samples a step, in an epoch of five steps with dropout, that ended after two."""
    path = write_recipe(
        folder / "recipe.yaml",
        derived(
            data, data__pack_samples=False, micro_batch_size=1, global_batch_size=8, train_iters=6,
            model__config={**recipe(data)["model"]["config"], "attention_dropout": 0.2},
            checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}], **changes,
        ),
    )  # fmt: skip
    go(path, folder / "run", "exit_iteration=2")
    return path


BF16 = {"model__dtype": "bf16"}
OFFLOAD = {"deepspeed__zero_optimization__offload_optimizer": {"device": "cpu"}}
LORA = {"model__peft_config": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (0, {}), (2, BF16),
        *(pytest.param(*case, marks=pytest.mark.full)
          for case in [(1, {}), (2, {}), (3, {}), (0, BF16), (1, BF16), (3, BF16), (2, OFFLOAD), (3, LORA)]),
    ],
)  # fmt: skip
def test_a_resume_that_tries_first_is_one_that_does_not(
    tmp_path: Path, data: Path, stage: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows at once instead of one: to the bit, lines and weights."""
    path = cut(tmp_path, data, deepspeed__zero_optimization__stage=stage, **changes)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    step, tried = trial.trial_step, []

    def watched(trainer: Any, samples: Any) -> float:
        tried.append([len(trainer.equipment.loader.samples[int(i)]["input_ids"]) for i in samples])
        return step(trainer, samples)

    monkeypatch.setattr(trial, "trial_step", watched)
    go(path, tmp_path / "run", "micro_batch_size=2", resume="latest")
    monkeypatch.setattr(trial, "trial_step", lambda *_: 0.0)
    go(path, tmp_path / "other", "micro_batch_size=2", resume="latest")
    assert len(tried) == 1
    assert len(tried[0]) == 8
    assert tried[0] == sorted(tried[0], reverse=True)
    assert without_clocks(tmp_path / "run") == without_clocks(tmp_path / "other")
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    one, other = (read_weights(tmp_path / name / "checkpoints/step-6") for name in ("run", "other"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_resume_that_is_divided_as_before_tries_nothing(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cut(tmp_path, data)
    monkeypatch.setattr(trial, "trial_step", lambda *_: pytest.fail("tried"))
    go(path, tmp_path / "run", resume="latest")
    assert len(lines(tmp_path / "run")) >= 6


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"world_size": 4, "tensor_parallel_size": 2}, ""),
        ({"world_size": 2, "tensor_parallel_size": 2}, "4 ranks instead of 2"),
        ({"world_size": 4, "tensor_parallel_size": 4}, "layers shared by 2 ranks instead of 4"),
        ({"world_size": 4}, "layers shared by 2 ranks instead of 1"),
        ({"world_size": 4, "tensor_parallel_size": 2, "sequence_parallel_size": 2},
         "rows shared by 1 rank instead of 2"),
    ],
)  # fmt: skip
def test_ranks_are_others_where_one_holds_another_part(saved: dict[str, Any], said: str) -> None:
    assert trial.ranks_otherwise(saved, World(size=4, tensor_parallel_size=2)) == said


QUIET = """
from arctic_like.trainer import trial

trial.trial_step = lambda *_: 0.0
"""
WATCHED = """
from pathlib import Path
from arctic_like.trainer import trial

done = trial.trial_step


def trial_step(trainer, samples):
    with Path(__file__).with_suffix(".txt").open("a") as file:
        file.write(f"{trainer.world.tensor_parallel_size}{trainer.world.sequence_parallel_size}\\n")
    return done(trainer, samples)


trial.trial_step = trial_step
"""
LAYERS, ROWS = "deepspeed.tensor_parallel.autotp_size=2", "sequence_parallel_size=2"


@pytest.mark.full
def test_a_resume_that_shares_otherwise_tries_first_and_is_one_that_does_not(
    tmp_path: Path, data: Path
) -> None:
    """On two ranks, to the bit: from shared layers to none, from none to shared layers or rows."""
    changes = {
        "from-layers": ((LAYERS,), ()),
        "to-layers": ((), (LAYERS,)),
        "to-rows": ((), (ROWS,)),
    }
    path = write_recipe(
        tmp_path / "recipe.yaml",
        derived(
            data, data__pack_samples=False, global_batch_size=8, train_iters=4,
            model__dtype="bf16", deepspeed__zero_optimization__stage=2,
            checkpoint=[{"type": "deepspeed", "save_every_n_steps": 2}],
        ),
    )  # fmt: skip
    (tmp_path / "watched.py").write_text(WATCHED)
    (tmp_path / "quiet.py").write_text(QUIET)
    kinds = ("tried", "untried")
    runs = [(name, kind) for kind in kinds for name in changes]

    def job(name: str, kind: str, *overrides: str, resume: str = "") -> dict[str, Any]:
        run = str(tmp_path / f"{name}-{kind}")
        return {
            "recipe": str(path),
            "output_dir": run,
            "overrides": list(overrides),
            "resume": resume,
        }

    jobs = [job(*run, "exit_iteration=2", *changes[run[0]][0]) for run in runs]
    for name, kind in runs:
        code = tmp_path / ("watched.py" if kind == "tried" else "quiet.py")
        jobs.append(job(name, kind, f"code={code}", *changes[name][1], resume="latest"))
    drive(jobs, ranks=2, folder=tmp_path, timeout=900)
    tried = (tmp_path / "watched.txt").read_text().split()
    assert tried == ["11", "11", "21", "21", "12", "12"]  # both ranks of each
    for name in changes:
        ours, theirs = (tmp_path / f"{name}-{kind}" for kind in kinds)
        assert [line["step"] for line in train_lines(ours)] == [1, 2, 3, 4]
        assert without_clocks(ours) == without_clocks(theirs), name
        assert (ours / "facts.json").read_text() == (theirs / "facts.json").read_text(), name


def test_the_first_step_has_the_longest_samples(tmp_path: Path, data: Path) -> None:
    """By the tokens of a run's own lines: no step of the first epoch trains longer rows."""
    seen: list[list[int]] = []

    def watch(trainer: Any) -> None:
        step = trainer.step

        def watched(micro_batches: Any) -> None:
            read = trainer.equipment.loader.samples
            seen.append(sorted((len(read[i]["input_ids"]) for m in micro_batches for i in m.samples),
                               reverse=True))  # fmt: skip
            step(micro_batches)

        trainer.step = watched

    path = write_recipe(
        tmp_path / "recipe.yaml",
        derived(data, data__pack_samples=False, global_batch_size=8, train_iters=5),
    )
    execute(load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest(),
            inspect=watch)  # fmt: skip
    everything = sorted((length for step in seen for length in step), reverse=True)
    assert len(everything) == 40
    assert seen[0] == everything[:8]


CODE = """
import torch
from arctic_like import SFTTrainer


class Narrow(SFTTrainer):
    name = "narrow"

    def loss(self, batch):
        if batch["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().loss(batch)
"""


def test_what_does_not_fit_fails_before_the_checkpoint_is_loaded(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has room for two rows at once, and a resume with four."""
    (tmp_path / "narrow.py").write_text(CODE)
    path = cut(tmp_path, data, type="narrow", code=str(tmp_path / "narrow.py"))
    before = lines(tmp_path / "run")
    monkeypatch.setattr(
        "arctic_like.planning.failure.plan_for_failure", lambda *_, **__: "the plan"
    )
    with pytest.raises(
        RunError, match=r"(?s)in step 1, micro-batch 1 of 2 \(4 x \d+\), a trial.*the plan"
    ):
        go(path, tmp_path / "run", "micro_batch_size=4", resume="latest")
    assert lines(tmp_path / "run") == before
    go(path, tmp_path / "run", "micro_batch_size=2", resume="latest")
    assert [line["step"] for line in train_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
