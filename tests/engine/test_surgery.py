"""Rows that come and go, weights that stand in for others, and both through checkpoints: beside plain torch,
and to the bit against runs that were left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.launch import (
    EVERY_STAGE,
    OFFLOAD,
    SAVED,
    SURGERY,
    VARIANTS,
    Found,
    job,
    name_of,
    probe,
    rounding,
)

pytestmark = pytest.mark.full

CHECKS = ("surgery", "nothing", "swapping")
ALL = [
    job(check, stage, dtype, **options)
    for check in CHECKS
    for stage, dtype, options in EVERY_STAGE + OFFLOAD + VARIANTS
]


def correct(job: dict[str, Any], found: dict[str, Any], *, ranks: int) -> None:
    """What is true of one rank's findings."""
    allowed = rounding(job)
    if job["check"] == "surgery":
        for moment in ("at once", "later", "norm", "last"):
            assert found[moment] < allowed, moment
        assert all(found[key] for key in ("carried", "same object", "rates", "counted"))
    if job["check"] == "nothing":
        assert found == {"bits": True, "norms": True}
    if job["check"] == "swapping":
        assert "other weights stand in" in found.pop("training refused")
        found.pop("digest")
        assert all(found.values()), found
        assert len(found) == 8
    if job["check"] == "leaks":
        (hooks, held), *later = found["counted"]  # every nine operations, without the collector
        assert later
        assert all(each[0] == hooks for each in later)
        assert later[-1][1] < held + 100 * len(later)  # one share of the weights is ten times that
        assert found["alive"] == 0
    if job["check"] == "refused":
        _refused(found, ranks)


def _refused(found: dict[str, Any], ranks: int) -> None:
    assert found["untouched"]
    for name, words in {
        "name": "'pints'", "index": "rows 0 to 37", "shape": "must be (2, 3)", "empty": "at least one",
        "dtype": "torch.float32", "moment": "no velocity", "partial": "half summed",
    }.items():  # fmt: skip
        assert words in found[name], name
    if ranks > 1:
        assert "rank 1 brings other new rows for points than rank 0" in found["values"]
        assert "rank 1 brings other rows to keep for points" in found["rows"]
        assert "rank 1 changes colors, rank 0 points" in found["names"]
        assert "rows 99 to 99 of points" in found["one rank"]


@pytest.mark.parametrize("job", SURGERY, ids=name_of)
def test_two_ranks(two_ranks: Found, job: dict[str, Any]) -> None:
    ranks = two_ranks[name_of(job)]
    assert ranks[0].get("digest") == ranks[1].get("digest")
    for found in ranks:
        correct(job, found, ranks=2)


def test_a_resume_of_grown_weights_is_the_run_that_went_on(two_ranks: Found, probes: Path) -> None:
    """In a new process, to the bit."""
    again = probe([job("load", s, d) for s, d in SAVED], ranks=2, folder=probes)
    for stage, dtype in SAVED:
        left = two_ranks[f"save-{stage}-{dtype}"][0]
        assert left["rows"] == [31, 3]
        for found in again[f"load-{stage}-{dtype}"]:
            assert found["digest"] == left["digest"]
            assert found["rows"] == left["rows"]
            assert found["resized"] == ["colors", "points", "sharpness"]


def test_a_resume_at_another_number_of_ranks(two_ranks: Found, probes: Path) -> None:
    jobs = [job("load", s, d, ranks=2) for s, d in SAVED] + [job("mistaken", 3, "bf16", ranks=2)]
    alone = probe(jobs, ranks=1, folder=probes)
    for stage, dtype in SAVED:
        left = two_ranks[f"save-{stage}-{dtype}"][0]
        assert alone[f"load-{stage}-{dtype}-ranks"][0]["saved"] == left["saved"]
    wrong = alone["mistaken-3-bf16-ranks"][0]
    assert "holds points in the shape (31, 3), this model has (37, 3)" in wrong["shape"]
    assert "sharpest" in wrong["names"]


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("check", CHECKS)
def test_every_stage_and_offload(check: str, ranks: int, tmp_path: Path) -> None:
    jobs = [job for job in ALL if job["check"] == check]
    found = probe(jobs, ranks=ranks, folder=tmp_path)
    for one in jobs:
        for each in found[name_of(one)]:
            correct(one, each, ranks=ranks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_resume(ranks: int, tmp_path: Path) -> None:
    stages = [(stage, dtype) for stage, dtype, _ in EVERY_STAGE]
    saved = probe([job("save", s, d) for s, d in stages], ranks=ranks, folder=tmp_path)
    again = probe([job("load", s, d) for s, d in stages], ranks=ranks, folder=tmp_path)
    for stage, dtype in stages:
        left, found = saved[f"save-{stage}-{dtype}"], again[f"load-{stage}-{dtype}"]
        assert [f["digest"] for f in found] == [f["digest"] for f in left]


@pytest.mark.full
def test_a_hundred_changes_leave_nothing_behind(tmp_path: Path) -> None:
    jobs = [job("leaks", stage, "bf16", times=100) for stage in (1, 2, 3)]
    for one, (found,) in zip(jobs, probe(jobs, ranks=1, folder=tmp_path).values(), strict=True):
        correct(one, found, ranks=1)
