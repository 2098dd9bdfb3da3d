"""Where checkpoints lie and which of them count: complete or invisible.

A checkpoint is a folder `step-N` with the marker `complete.json`, which is written last and names every
file with its size and checksum. A folder without the marker is what a killed save left behind.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MARKER = "complete.json"
LATEST = "latest"
BEST = "best"
ENGINE = "engine"
RUN_STATE = "run.json"
_STEP = re.compile(r"step-(\d+)")


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None if it is none."""
    match = _STEP.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def marker(folder: Path) -> dict[str, Any] | None:
    """The marker's content, or None where the checkpoint is not complete."""
    try:
        content = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def missing_files(folder: Path) -> list[str]:
    """Files that the marker names and that are absent or of another size; empty if all are there."""
    content = marker(folder)
    if content is None:
        return [MARKER]
    wrong = []
    for name, entry in content["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            wrong.append(name)
    return wrong


def saved_folders(checkpoints: Path) -> list[Path]:
    """All `step-N` folders, complete or damaged, oldest first by step *number*."""
    if not checkpoints.is_dir():
        return []
    found = [
        (step, path)
        for path in checkpoints.iterdir()
        if path.is_dir() and (step := step_of(path)) is not None
    ]
    return [path for _, path in sorted(found)]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All complete checkpoints of a `checkpoints/` folder, oldest first by step *number*."""
    return [path for path in saved_folders(checkpoints) if not missing_files(path)]


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, whatever `latest` says."""
    complete = complete_checkpoints(checkpoints)
    return complete[-1] if complete else None
