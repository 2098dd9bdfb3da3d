"""A folder that appears whole or not at all: written aside, synced, marked, renamed.

The order is what makes a kill at any moment harmless: files, their syncs, the marker, the rename, the
pointers `latest` and `best`, and only then the removal of what is old.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arctic_like.checkpoint.layout import (
    BEST,
    LATEST,
    MARKER,
    complete_checkpoints,
    marker,
    newest,
    step_of,
)
from arctic_like.checkpoint.retention import (
    Monitored,
    Retention,
    best_checkpoint,
    best_of,
    named_best,
    values_of,
)
from arctic_like.errors import CheckpointError

ASIDE = ".partial"
REPLACED = ".replaced"
SUPERSEDED = "superseded-"
CHUNK = 1 << 24


def aside(folder: Path) -> Path:
    """Where `folder` is written before it is published."""
    return folder.with_name(folder.name + ASIDE)


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and xxh3-128 of a file."""
    import xxhash

    state = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
            size += len(chunk)
    return {"size": size, "xxh3": state.hexdigest()}


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[str]:
    """Relative paths of all files below, sorted, the marker left out."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER
    )


def seal(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Sync these files to the disk; return what the marker says of them."""
    entries = {}
    for name in names:
        sync(folder / name)
        entries[name] = digest(folder / name)
    return entries


def publish(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the marker into what was written aside, and let it appear (one process)."""
    written = aside(folder)
    text = json.dumps({"version": 1, "files": dict(sorted(entries.items()))}, indent=1)
    (written / MARKER).write_text(text)
    sync(written / MARKER)
    appear(folder)
    point_latest(folder)


def appear(folder: Path) -> None:
    """Give what was written aside, whose files are on the disk, its name (one process).

    An older folder of that name is removed once the new one stands in its place.
    """
    written = aside(folder)
    for below in sorted({written, *(p for p in written.rglob("*") if p.is_dir())}):
        sync(below)
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    written.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder so that a kill half-way leaves nothing that looks whole."""
    doomed = aside(folder)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def point(name: str, folder: Path) -> None:
    """Let the pointer `latest` or `best` name a checkpoint, atomically."""
    pointer = folder.parent / (name + ASIDE)
    pointer.write_text(folder.name + "\n")
    sync(pointer)
    pointer.rename(folder.parent / name)
    sync(folder.parent)


def point_latest(folder: Path) -> None:
    """Let `latest` name a checkpoint."""
    point(LATEST, folder)


def point_best(checkpoints: Path, best: Path | None) -> None:
    """Let `best` name a checkpoint, or take it away where none is best."""
    if best is None:
        (checkpoints / BEST).unlink(missing_ok=True)
    elif named_best(checkpoints) != best.name:
        point(BEST, best)


def tidy(
    folder: Path, saved: list[Path], retention: Retention, monitored: Monitored
) -> list[Path]:  # fmt: skip
    """Point `best` to the best of those that stay, then remove the others; returns what stayed.

    saved: the complete `step-N` folders in `folder`, the one that was just published among them.
    """
    values = values_of(saved, monitored.metric)
    kept = retention.kept(values, monitored.mode)
    stay = [path for path in saved if step_of(path) in kept]
    point_best(folder, best_of(stay, monitored))
    for path in saved:
        if path not in stay:
            remove(path)
    return stay


def recover(checkpoints: Path, *, marked: bool = True) -> list[str]:
    """Tidy what a killed save left behind (one process); returns the names that were removed.

    A complete folder that was about to be replaced comes back if its successor never came. marked: the
    folders have markers and pointers (checkpoints), or neither (exports). A `step-N` without its marker is
    no work of a kill: it got its name with the marker inside. It stays, and does not count.
    """
    if not checkpoints.is_dir():
        return []
    removed = []
    for path in sorted(checkpoints.iterdir()):
        ours = path.name.startswith("step-") and path.name.endswith((ASIDE, REPLACED))
        if not ours or not path.is_dir():
            continue
        if path.name.endswith(REPLACED):
            original = path.with_name(path.name.removesuffix(REPLACED))
            if original.exists():
                shutil.rmtree(path)
            else:
                path.rename(original)
        else:
            shutil.rmtree(path)
            removed.append(path.name)
    for name in (LATEST, BEST):
        (checkpoints / (name + ASIDE)).unlink(missing_ok=True)
    if marked and (found := newest(checkpoints)) is not None:
        point_latest(found)
        point_best(checkpoints, best_checkpoint(checkpoints))
    return removed


def supersede_after(folder: Path) -> list[str]:
    """Set aside the checkpoints that are newer than `folder`, from which a run now goes on.

    They belong to a course that is given up; left in place, the next resume would pick them.
    """
    here = step_of(folder) or 0
    names = []
    for path in complete_checkpoints(folder.parent):
        if (step_of(path) or 0) > here:
            target = path.with_name(SUPERSEDED + path.name)
            shutil.rmtree(target, ignore_errors=True)
            path.rename(target)
            names.append(path.name)
    point_latest(folder)
    point_best(folder.parent, best_checkpoint(folder.parent))
    return names


def verify(folder: Path, names: Iterable[str]) -> None:
    """Compare files with the marker. Raises CheckpointError naming the first that differs."""
    content = marker(folder)
    if content is None:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MARKER}")
    for name in names:
        path = folder / name
        if not path.is_file() or digest(path) != content["files"][name]:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} is not what was saved\n"
                "    resume from another one: arctic-train resume RUN_DIR --step N"
            )


def check_space(folder: Path, needed: int) -> str:
    """Empty if `needed` bytes fit on the folder's file system, else the sentence that says no."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return (
        f"{folder} has {free / 1e9:.2f} GB free, and the checkpoint needs about {needed / 1e9:.2f} GB; "
        "free some space, set checkpoint keep_last, or another output_dir"
    )
