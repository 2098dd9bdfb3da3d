"""Every method is planned for a GPU. That nothing of a step or an evaluation lies on the host by mistake
shows here, too: an operation on tensors of two places ends the rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import environment, write_recipe
from tests.methods.test_every_method import METHODS, write_everything

SCRIPT = Path(__file__).with_name("rehearse_methods.py")
DEFAULT = ("distill-hidden", "distill-table", "embedding", "labels", "lora-further", "words")
MODELS = ("model", "teacher", "ref_model")


def ended(folder: Path, names: Any, *, dtype: str, stage: int) -> dict[str, str]:
    """Method → "", or how its rehearsal failed."""
    write_everything(folder)
    paths = {}
    for name in names:
        made = METHODS[name](folder)
        for part in MODELS:
            if isinstance(made.get(part), dict):
                made[part].get("model", made[part])["dtype"] = dtype
        made["deepspeed"]["zero_optimization"]["stage"] = stage
        paths[name] = str(write_recipe(folder / f"{name}.yaml", made))
    listing = folder / "listing.json"
    listing.write_text(json.dumps(paths))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(listing)],
        env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, str] = json.loads(listing.with_suffix(".ended").read_text())
    return found


def test_those_with_paths_of_their_own_are_planned(tmp_path: Path) -> None:
    assert set(ended(tmp_path, DEFAULT, dtype="bf16", stage=2).values()) == {""}


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "stage"), [("fp32", 0), ("bf16", 3)])
def test_all_are_planned(tmp_path: Path, dtype: str, stage: int) -> None:
    found = ended(tmp_path, METHODS, dtype=dtype, stage=stage)
    assert not {name: error for name, error in found.items() if error}
