"""What a recipe takes, told where a run has ended for want of memory.

The plan is made by `arctic-train plan` in a process of its own, which needs no GPU: the one that failed still
holds its memory and its process groups.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arctic_like.errors import FAILED
from arctic_like.stop import CONTROL_DIR

LIMIT = 120.0
"""Seconds that a plan may take; what was found until then is told."""
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK",
             "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
CLAIM = "out-of-memory"


def plan_for_failure(
    folder: Path, *, ranks: int, memory: float | None = None, seconds: float = LIMIT
) -> str:
    """The page of `arctic-train plan` for the run in `folder`, or a sentence that says why there is none.
    Raises nothing.

    ranks: of the run. memory: bytes of a GPU; None: it ran on the CPU. The cheapest change comes last, so
    that a plan that is cut off after `seconds` lacks that alone.
    """
    try:
        return _page(folder / "recipe.yaml", ranks, memory, seconds)
    except Exception as error:
        return f"no plan could be made: {type(error).__name__}: {error}"


def _page(recipe: Path, ranks: int, memory: float | None, seconds: float) -> str:
    words = ["plan", str(recipe), "--ranks", str(ranks)]
    if memory is not None:
        words = ["plan", str(recipe), "--gpus", str(ranks), "--gpu-memory", str(int(memory))]
    if _streams(recipe):
        words.append("--no-data")
    command = [sys.executable, "-m", "arctic_like.cli.main", *words]
    kept = {
        name: value for name, value in os.environ.items()
        if name not in OF_A_RANK and not name.startswith("ARCTIC_")
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=told, stderr=complaints,
            env={**kept, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        complaints.seek(0)
        page, last = told.read().rstrip(), complaints.read().strip().splitlines()[-3:]
    by_hand = f"arctic-train {' '.join(words)}"
    if code is None:
        return f"{page}\n(cut off after {seconds:.0f} s; whole: {by_hand})".lstrip()
    if code == FAILED or not page:
        return "\n".join([page, f"no plan could be made ({by_hand}):", *last]).lstrip()
    return page


def _streams(recipe: Path) -> bool:
    """Whether the recipe's samples are made while training."""
    import yaml

    content: Any = yaml.safe_load(recipe.read_text())
    data = content.get("data")
    return isinstance(data, dict) and bool(data.get("streaming"))


def is_first_to_plan() -> bool:
    """Whether no other rank of this machine plans. Ranks run out of memory together; the first plans."""
    folder = os.environ.get(CONTROL_DIR)
    if not folder:
        return True
    try:
        os.close(os.open(Path(folder) / CLAIM, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # no such folder on this machine
        return True
    return True


def wait_for_the_planner(seconds: float = LIMIT + 30) -> None:
    """Wait to be ended: the launcher ends all ranks when the one that plans has told. The end of any other
    would end that."""
    time.sleep(seconds)
