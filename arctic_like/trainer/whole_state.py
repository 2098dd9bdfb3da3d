"""The whole training state as one value in memory: the files of a checkpoint, by name.

The same code writes and reads it as a checkpoint on the disk, so nothing can be forgotten in one and not
in the other.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.checkpoint.publish import aside, files_below, publish, seal
from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

FOLDER = "step-0"


def whole_state(trainer: Trainer) -> dict[str, Any]:
    """Everything a resume needs. Collective; each rank gets a part of the files (uint8 tensors)."""
    import numpy as np
    import torch

    session, saver = trainer.session, trainer.equipment.saver
    with _workplace(trainer) as folder:
        saver.write(trainer, _engine(trainer), folder / FOLDER)
        names = files_below(folder / FOLDER)[session.world.rank :: session.world.size]
        files = {n: torch.from_numpy(np.fromfile(folder / FOLDER / n, np.uint8)) for n in names}
    return {"world_size": session.world.size, "files": files}


def take_whole_state(trainer: Trainer, state: dict[str, Any]) -> None:
    """Go on from what `whole_state` gave, at the same number of ranks. Collective."""
    world, host = trainer.session.world, trainer.session.host
    if state["world_size"] != world.size:
        raise CheckpointError(
            f"this state is of {state['world_size']} ranks, and here are {world.size}\n"
            "    a checkpoint on the disk can be resumed at any number of ranks"
        )
    with _workplace(trainer) as folder:
        directory = folder / FOLDER
        for name, content in state["files"].items():
            path = aside(directory) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content.numpy().tofile(path)
        parts = host.gather(seal(aside(directory), list(state["files"])))
        if world.is_main:
            publish(directory, {name: entry for part in parts for name, entry in part.items()})
        host.barrier()
        trainer.equipment.saver.read(trainer, _engine(trainer), directory)


def _engine(trainer: Trainer) -> Any:
    from arctic_like.checkpoint.deepspeed import DeepSpeedCheckpoint, DeepSpeedCheckpointConfig

    # not the recipe's own, which would remove older ones beside it
    return DeepSpeedCheckpoint(DeepSpeedCheckpointConfig())


@contextlib.contextmanager
def _workplace(trainer: Trainer) -> Iterator[Path]:
    """A folder in the run directory, which all ranks see; gone afterwards."""
    world, host = trainer.session.world, trainer.session.host
    folder = trainer.session.directory.path / ".state.partial"
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    host.barrier()
    try:
        yield folder
    finally:
        host.barrier()
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
