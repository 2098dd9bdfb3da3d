"""`deepspeed`: everything that a resume needs, of all ranks, complete or invisible.

step-12/engine/…        a DeepSpeed checkpoint of each learner (`engine`, `engine-critic`, …)
step-12/ranks/rank-0.pt each rank's random generators, sums and callbacks' states
step-12/run.json        counters, data position, world size, the recipe
step-12/complete.json   the marker, written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.checkpoint.background import BackgroundSave
from arctic_like.checkpoint.base import CheckpointConfig, CheckpointEngine
from arctic_like.checkpoint.layout import ENGINE, RUN_STATE, complete_checkpoints, marker
from arctic_like.checkpoint.publish import (
    aside,
    check_space,
    files_below,
    publish,
    seal,
    verify,
)
from arctic_like.checkpoint.retention import MONITORED, Monitored
from arctic_like.engine.snapshot import CapturedFile, HostArena
from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    from arctic_like.engine.deepspeed import Engine
    from arctic_like.engine.host import HostGroup
    from arctic_like.world import World


_File = tuple[Callable[[Any, str], object], Any, str]
"""How a file is written, what into it, and its path."""


class DeepSpeedCheckpointConfig(CheckpointConfig):
    """A resumable checkpoint."""

    type: str = "deepspeed"
    """`deepspeed`: everything that a resume needs."""

    asynchronous: bool = False
    """Write while training goes on: the step that saves waits for a copy of the state to host memory, which
    this needs as much of as a checkpoint is large. The checkpoint appears when all of it is on the disk."""


class DeepSpeedCheckpoint(CheckpointEngine):
    """Saves and loads the whole state of a run."""

    name = "deepspeed"
    config_type = DeepSpeedCheckpointConfig
    resumable = True
    folder = "checkpoints"
    config: DeepSpeedCheckpointConfig

    def __init__(self, config: DeepSpeedCheckpointConfig) -> None:
        super().__init__(config)
        self._background: BackgroundSave | None = None
        self._arena = HostArena()

    @property
    def background(self) -> BackgroundSave | None:
        """See `CheckpointEngine.background`."""
        return self._background

    def prepare(
        self, *, engines: dict[str, Engine], rank_state: Callable[[], Any], world: World
    ) -> None:  # fmt: skip
        """Make room for the first copy of the state while training goes on."""
        if self.config.asynchronous:
            self._arena.prepare(
                [engine.live_state(main=world.is_main) for engine in engines.values()]
            )

    def save(
        self,
        *,
        directory: Path,
        engines: dict[str, Engine],
        run_state: dict[str, Any],
        rank_state: dict[str, Any],
        world: World,
        host: HostGroup,
        state_bytes: int,
        monitored: Monitored | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Write `directory` (a `step-N`) whole. Collective.

        run_state: plain values, the same on all ranks. rank_state: this rank's, types and tensors.
        state_bytes: what all ranks' files will need at least. Raises CheckpointError if that is not free.
        monitored: what these weights measured; decides, with those of the others, which of them stay.
        Where the config is `asynchronous`, it returns when the state is copied; see `background`. The one
        before must be over.
        """
        import torch

        partial = aside(directory)
        metric = monitored or Monitored()
        run_state = {**run_state, MONITORED: metric.as_dict()}
        refused = ""
        if world.is_main:
            directory.parent.mkdir(parents=True, exist_ok=True)
            refused = check_space(directory.parent, state_bytes)
            if not refused:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "ranks").mkdir(parents=True)
                (partial / RUN_STATE).write_text(json.dumps(run_state, indent=1))
        refused = host.from_main(refused)
        if refused:
            raise CheckpointError(refused)
        rank_file = f"ranks/rank-{world.rank}.pt"
        captured: list[CapturedFile] = []
        error: BaseException | None = None
        try:
            for name, engine in engines.items():
                captured += engine.save(partial, tag=tag_of(name), capture=self.config.asynchronous)
            if self.config.asynchronous:
                copies = self._arena.snapshot([*(file.state for file in captured), rank_state])
            else:
                torch.save(rank_state, partial / rank_file)
        except (OSError, RuntimeError) as problem:
            error = _not_written(directory, problem)
        host.raise_together(error)

        def conclude(entries: dict[str, Any]) -> None:
            publish(directory, entries)
            self.let_go(
                complete_checkpoints(directory.parent), metric,
                steps_per_epoch=steps_per_epoch, total_steps=total_steps,
            )  # fmt: skip

        if self.config.asynchronous:
            *states, rank_copy = copies
            # Without the states themselves, which would live as long as this.
            files: list[_File] = [
                (f.write, state, f.path) for f, state in zip(captured, states, strict=True)
            ]
            files.append((torch.save, rank_copy, str(partial / rank_file)))
            self._background = BackgroundSave(
                partial, rank=world.rank, ranks=world.size, publish=conclude,
                write=lambda: _write(files, partial, directory),
            )  # fmt: skip
            return
        mine = files_below(partial)[world.rank :: world.size]
        entries: dict[str, Any] = {}
        for part in host.gather(seal(partial, mine)):
            entries.update(part)
        if world.is_main:
            conclude(entries)
        host.barrier()

    def load(
        self,
        *,
        directory: Path,
        engines: dict[str, Engine],
        world: World,
        host: HostGroup,
    ) -> list[dict[str, Any]]:
        """Bring the engines to what `directory` holds; return every saved rank's `rank_state`.

        At another number of ranks the shards are first converted to DeepSpeed's universal form, for
        the time of loading. Collective. Raises CheckpointError for damage.
        """
        import torch

        content = marker(directory)
        names = sorted(content["files"]) if content else []
        host.raise_together(_error_of(lambda: verify(directory, names[world.rank :: world.size])))
        saved = json.loads((directory / RUN_STATE).read_text())
        for name, engine in engines.items():
            if needs_conversion(saved, world=world, zero_stage=engine.zero_stage):
                _load_converted(directory, name, engine, world=world, host=host)
            else:
                engine.load(directory, tag=tag_of(name))
        return [
            torch.load(directory / "ranks" / f"rank-{rank}.pt", weights_only=True)
            for rank in range(saved["world_size"])
        ]


def _write(files: list[_File], partial: Path, directory: Path) -> list[str]:
    """Write copies of states, each with its way of writing and its path; their names inside `partial`."""
    try:
        for write, state, path in files:
            write(state, path)
    except (OSError, RuntimeError) as problem:
        raise _not_written(directory, problem) from problem
    return [str(Path(path).relative_to(partial)) for _, _, path in files]


def _not_written(directory: Path, problem: BaseException) -> CheckpointError:
    return CheckpointError(f"the checkpoint {directory} could not be written: {problem}")


def tag_of(learner: str) -> str:
    """The folder of a learner's engine inside a checkpoint."""
    return ENGINE if learner == "model" else f"{ENGINE}-{learner}"


def needs_conversion(run_state: dict[str, Any], *, world: World, zero_stage: int) -> bool:
    """Whether a saved state loads here only through the universal form (stage 0 is whole anyway)."""
    same = same_ranks(run_state, world) and run_state["zero_stage"] == zero_stage
    return zero_stage > 0 and not same


def same_ranks(run_state: Mapping[str, Any], world: World) -> bool:
    """Whether as many ranks as here saved it, and shared layers as they do here."""
    layers = run_state.get("tensor_parallel_size", 1)
    return bool(run_state["world_size"] == world.size and layers == world.tensor_parallel_size)


def _load_converted(
    directory: Path, name: str, engine: Engine, *, world: World, host: HostGroup
) -> None:
    from arctic_like.engine.deepspeed import to_universal

    workplace = directory.with_name(f"{directory.name}.universal.partial")
    error: BaseException | None = None
    if world.is_main:
        shutil.rmtree(workplace, ignore_errors=True)
        workplace.mkdir(parents=True)
        error = _error_of(
            lambda: to_universal(
                directory / tag_of(name), workplace / tag_of(name),
                for_parts=world.tensor_parallel_size > 1,
            )
        )  # fmt: skip
    host.raise_together(error)
    engine.load(workplace, tag=tag_of(name))
    host.barrier()
    if world.is_main:
        shutil.rmtree(workplace, ignore_errors=True)


def _error_of(action: Any) -> BaseException | None:
    try:
        action()
    except CheckpointError as error:
        return error
    return None
