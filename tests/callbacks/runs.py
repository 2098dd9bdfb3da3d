"""Tiny real runs in this process, with the parts of `parts.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest
from tests.callbacks import parts as parts  # registers them
from tests.integration.tools import write_recipe


def train(
    folder: Path, content: dict[str, Any], *overrides: str, resume: str = "", name: str = "run"
) -> Any:
    path = write_recipe(folder / f"{name}.yaml", content)
    return execute(
        load_recipe(path, overrides), output_dir=folder / name, resume=resume, stop=StopRequest(),
    )  # fmt: skip
