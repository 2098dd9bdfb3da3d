"""Full gradients at every ZeRO stage, and models trained against each other, beside plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.launch import (
    EVERY_STAGE,
    GRADIENTS,
    OFFLOAD,
    VARIANTS,
    Found,
    job,
    name_of,
    probe,
    rounding,
)

pytestmark = pytest.mark.full

ALL = [
    job(check, stage, dtype, **options)
    for check in ("gradients", "idle", "later")
    for stage, dtype, options in EVERY_STAGE + OFFLOAD + VARIANTS
]
ALL += [
    job(check, stage, dtype)
    for check in ("adversary", "teacher")
    for stage, dtype, _ in EVERY_STAGE
]


def correct(job: dict[str, Any], found: dict[str, Any]) -> None:
    """What is true of one rank's findings."""
    allowed = rounding(job)
    if job["check"] == "gradients":
        for step in (0, 1):
            assert found[f"read {step}"] < allowed
            assert found[f"float32 {step}"]
            assert found[f"set {step}"] < 1e-7
            assert found[f"norm {step}"] < 1e-5
            assert found[f"weights {step}"] < 1e-5
        assert "between the last backward of a step and its optimizer step" in found["late"]
        assert "'point'" in found["unknown"]
        assert "did you mean points?" in found["unknown"]
        assert "(3, 37), but the parameter has (37, 3)" in found["shape"]
    if job["check"] == "later":
        assert found["weights"] < 1e-4
    if job["check"] == "idle":
        assert found["gradients"] < allowed
        assert found["weights"] < 1e-4
    if job["check"] == "adversary":
        assert found["size"] > 1e-3
        assert found["gradients"] < allowed
        assert found["critic"] < allowed
        assert found["as before"]
        assert found["still fixed"]
    if job["check"] == "teacher":
        assert all(found[key] for key in ("output", "again", "pruned", "frozen"))
        assert "has no optimizer" in found["refused"]


@pytest.mark.parametrize("job", GRADIENTS, ids=name_of)
def test_two_ranks_are_as_one_without_zero(two_ranks: Found, job: dict[str, Any]) -> None:
    ranks = two_ranks[name_of(job)]
    for found in ranks:
        correct(job, found)
    assert ranks[0].get("digest") == ranks[1].get("digest")


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("check", ["gradients", "idle", "later", "adversary", "teacher"])
def test_every_stage_and_offload(check: str, ranks: int, tmp_path: Path) -> None:
    jobs = [job for job in ALL if job["check"] == check]
    found = probe(jobs, ranks=ranks, folder=tmp_path)
    for one in jobs:
        for each in found[name_of(one)]:
            correct(one, each)
        assert len({each.get("digest") for each in found[name_of(one)]}) == 1
