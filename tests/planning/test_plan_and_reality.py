"""What is planned is what is allocated: recipes rehearsed without memory, then trained under torch's
allocator's own records. Peaks of the fullest rank within 10 %, optimizer steps to the number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import (
    environment,
    free_port,
    recipe,
    write_conversations,
    write_recipe,
)
from tests.planning.matrix import BASE, DEFAULT, ONE_RANK, SHARED_LAYERS, TWO_RANKS

HERE = Path(__file__).parent
TOLERANCE = 0.10


def compared(folder: Path, changes: dict[str, dict[str, Any]], *, ranks: int) -> dict[str, Any]:
    """Name → (planned, measured on every rank) of some recipes, in one process each."""
    data = write_conversations(folder / "conversations.jsonl")
    paths = {
        name: str(write_recipe(folder / f"{name}.yaml", recipe(data, **{**BASE, **more})))
        for name, more in changes.items()
    }
    listing = folder / f"listing-{ranks}-{free_port()}.json"
    listing.write_text(json.dumps(paths))
    foresee = [sys.executable, str(HERE / "foresee.py"), str(listing), str(ranks)]
    measure = [sys.executable, str(HERE / "measure.py"), str(listing)]
    if ranks > 1:
        measure = [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks),
            "--master_port", str(free_port()), "--no_local_rank", *measure[1:],
        ]  # fmt: skip
    for command in (foresee, measure):
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    planned = json.loads(listing.with_suffix(".planned").read_text())
    measured = [
        json.loads(listing.with_suffix(f".measured-{rank}").read_text()) for rank in range(ranks)
    ]
    return {name: (planned[name], [one[name] for one in measured]) for name in paths}


def check(planned: dict[str, Any], measured: list[dict[str, int]]) -> None:
    peak = max(one["peak"] for one in measured)
    assert abs(planned["peak"] / peak - 1) <= TOLERANCE, (planned["peak_by_kind"], peak)
    assert {one["steps"] for one in measured} == {planned["steps"]}


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    changes = {name: ONE_RANK[name] for name in DEFAULT}
    return compared(tmp_path_factory.mktemp("some"), changes, ranks=1)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    changes = {name: more for name, more in ONE_RANK.items() if name not in DEFAULT}
    return compared(tmp_path_factory.mktemp("others"), changes, ranks=1)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compared(tmp_path_factory.mktemp("two"), TWO_RANKS, ranks=2)


@pytest.mark.parametrize("name", DEFAULT)
def test_peak_and_steps_of_a_recipe(some: dict[str, Any], name: str) -> None:
    check(*some[name])


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ONE_RANK if name not in DEFAULT])
def test_peak_and_steps_of_every_recipe(others: dict[str, Any], name: str) -> None:
    check(*others[name])


@pytest.mark.full
@pytest.mark.parametrize("name", TWO_RANKS)
def test_peak_and_steps_on_two_ranks(of_two_ranks: dict[str, Any], name: str) -> None:
    check(*of_two_ranks[name])


@pytest.mark.full
@pytest.mark.parametrize("ranks", SHARED_LAYERS)
def test_peak_and_steps_of_ranks_that_share_layers(tmp_path: Path, ranks: int) -> None:
    for planned, measured in compared(tmp_path, SHARED_LAYERS[ranks], ranks=ranks).values():
        check(planned, measured)


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(ONE_RANK) + len(TWO_RANKS) >= 40
    text = " ".join((*ONE_RANK, *TWO_RANKS))
    words = (
        "llama",
        "qwen3",
        "gemma3",
        "gpt2",
        "mixtral",
        "lora",
        "padded",
        "bf16",
        "checkpointed",
    )
    assert all(word in text for word in (*words, *(f"stage-{number}" for number in range(4))))
