"""Stands in for the command: `command.py OUTPUT_DIR [launcher options]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from arctic_like.cli.launch import launch

recipe = SimpleNamespace(
    path=Path("a recipe.yaml"),
    config=SimpleNamespace(device=os.environ.get("STAND_IN_DEVICE", "cpu")),
)
sys.exit(
    launch(
        recipe,
        overrides=["optimizer.lr=1e-5", 'name="a b"'],
        launcher_options=sys.argv[2:],
        output_dir=Path(sys.argv[1]),
        resume="auto",
        argv=["arctic-train", "a recipe.yaml"],
        worker_module="stand_in",
    )
)
