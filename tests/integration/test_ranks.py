"""Two real processes equal one, at every ZeRO stage, and a run goes on at another number of ranks."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from .tools import PORTS, drive, recipe, train_lines, write_conversations, write_recipe

STEPS = 20
STAGES = (0, 1, 2, 3)


class Runs:
    """All runs of this file, made by three launches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = write_conversations(folder / "data.jsonl", count=70)
        # 70 rows in global batches of 16 leave 6, of which two ranks get unequal shares.
        self.content = recipe(
            data, train_iters=STEPS, micro_batch_size=4, global_batch_size=16,
            data__pack_samples=False, optimizer__learning_rate=3e-3,
            checkpoint=[{"type": "deepspeed"}],
        )  # fmt: skip
        del self.content["gradient_accumulation_steps"]
        straight = [self.job(f"two-{stage}", stage) for stage in STAGES]
        first = [self.job(f"moving-{stage}", stage, "exit_iteration=7") for stage in (2, 3)]
        drive(straight + first, ranks=2, folder=folder)
        second = [self.job(f"moving-{s}", s, "exit_iteration=13", resume="latest") for s in (2, 3)]
        drive([self.job("one", 0), *second], ranks=1, folder=folder)
        drive([self.job(f"moving-{s}", s, resume="latest") for s in (2, 3)], ranks=2, folder=folder)

    def job(self, name: str, stage: int, *overrides: str, resume: str = "") -> dict[str, Any]:
        path = write_recipe(self.folder / "recipe.yaml", self.content)
        return {
            "recipe": str(path),
            "output_dir": str(self.folder / name),
            "overrides": [f"deepspeed.zero_optimization.stage={stage}", *overrides],
            "resume": resume,
        }

    def lines(self, name: str) -> list[dict[str, Any]]:
        return train_lines(self.folder / name)

    def facts(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name / "facts.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ranks"))


def same(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert line[key] == pytest.approx(other[key], rel=1e-5), (line["step"], key)
        for key in ("tokens", "samples_seen", "epoch"):
            assert line[key] == other[key], (line["step"], key)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one(runs: Runs, stage: int) -> None:
    assert runs.facts(f"two-{stage}")["initial"] == runs.facts("one")["initial"]
    assert runs.facts(f"two-{stage}")["samples"] == runs.facts("one")["samples"]
    same(runs.lines(f"two-{stage}"), runs.lines("one"))


def test_every_sample_comes_once_an_epoch(runs: Runs) -> None:
    """5 steps are an epoch of 70 samples; the last of its batches has 6."""
    steps = runs.facts("two-2")["samples"]
    assert [len(step) for step in steps] == [16, 16, 16, 16, 6] * 4
    for epoch in range(4):
        assert sorted(chain.from_iterable(steps[5 * epoch : 5 * epoch + 5])) == list(range(70))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_at_another_number_of_ranks(runs: Runs, stage: int) -> None:
    """7 steps on two ranks, 6 on one, 7 on two: the run that always had two, same samples."""
    same(runs.lines(f"moving-{stage}"), runs.lines(f"two-{stage}"))
    assert runs.facts(f"moving-{stage}")["samples"] == runs.facts("one")["samples"][13:]


def test_no_memory_is_left_behind(runs: Runs) -> None:
    """DeepSpeed's buffers between ranks on a CPU have lost their names once the runs are over."""
    left = [p.name for p in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")]
    assert not [name for name in left if any(f"_{port}_" in name for port in PORTS)]
