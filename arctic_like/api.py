"""Runs from Python: `load_recipe(path, overrides)` and `run(recipe)`, in a script or a notebook.

The same code runs in every launched process (`worker.py`); here it needs no launcher, works on one
process and several times in one process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import (
    ArcticError,
    CheckpointError,
    NonFiniteError,
    OutOfMemoryError,
    Problem,
    RecipeError,
)
from arctic_like.registry import build
from arctic_like.world import World

if TYPE_CHECKING:
    from arctic_like.engine.host import HostGroup
    from arctic_like.recipe import Recipe
    from arctic_like.rundir import RunDirectory
    from arctic_like.stop import StopRequest
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.progress import Result
    from arctic_like.trainer.startup import StartUp


def run(recipe: Recipe, *, output_dir: str | Path | None = None, resume: str = "") -> Result:
    """Train what a recipe describes, in this process; returns what it came to.

    output_dir: the run directory, instead of the recipe's. resume: "" starts (or resumes where the recipe
    says `auto_resume`), "latest" or "step-12" goes on from that checkpoint of the run directory.
    The first Ctrl-C stops after the step, with a checkpoint; the second interrupts.

    Raises RecipeError and RunError.
    """
    from loguru import logger

    from arctic_like.recipe import warnings
    from arctic_like.stop import StopRequest, catch_signals

    for problem in warnings(recipe.config):
        logger.warning(str(problem))
    directory = Path(output_dir) if output_dir else default_output_dir(recipe)
    with catch_signals(StopRequest()) as stop:
        return execute(recipe, output_dir=directory, resume=resume, stop=stop)


def fit(recipe: Recipe, *, output_dir: str | Path | None = None, resume: str = "") -> float:
    """`run`, for a search over runs: the final validation loss (`Result.final_loss`: the last value of
    `metric_monitor`, else the last train loss); infinite where a loss or gradient was not finite.

    Any other error is raised. `result.json` in the run directory has the same number.
    """
    try:
        return run(recipe, output_dir=output_dir, resume=resume).final_loss
    except NonFiniteError:
        return math.inf


def default_output_dir(recipe: Recipe) -> Path:
    """The recipe's `output_dir`, or a new folder `runs/<recipe>-<time>`."""
    if recipe.config.output_dir:
        return Path(recipe.config.output_dir)
    return Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def execute(
    recipe: Recipe, *, output_dir: Path, resume: str, stop: StopRequest,
    inspect: Callable[[Trainer], None] | None = None,
) -> Result:  # fmt: skip
    """Run a recipe on this rank: what the worker and `run` share.

    inspect: called with the trainer once it is set up (for tests and notebooks).
    """
    from arctic_like.engine.host import connect
    from arctic_like.logs import setup_logging
    from arctic_like.rundir import RunDirectory
    from arctic_like.trainer.startup import StartUp

    start_up = StartUp()
    device = choose_device(recipe.config.device)
    refuse_what_cannot_run(recipe, on_cpu=device == "cpu")
    world = _world(recipe, device)
    prepare_process(recipe, world)
    host = connect(world)
    directory = RunDirectory(output_dir)
    with _no_trace_of_a_false_start(directory, world), contextlib.ExitStack() as stack:
        checkpoint = _take_possession(recipe, directory, resume, host=host, stack=stack)
        logger = recipe.config.logger
        setup_logging(
            rank=world.rank, level=logger.level, output_dir=logger.output_dir or directory.logs,
            print_output_ranks=logger.print_output_ranks, file_output_ranks=logger.file_output_ranks,
        )  # fmt: skip
        return _run_trainer(
            recipe, world=world, host=host, directory=directory, checkpoint=checkpoint, stop=stop,
            start_up=start_up, inspect=inspect,
        )  # fmt: skip


def _world(recipe: Recipe, device: str) -> World:
    """This process among all. Raises RecipeError where the ranks cannot be put into groups."""
    from arctic_like.trainer.tensor_parallel import grouped

    world = World.from_environment(device)
    return grouped(
        world, recipe.config,
        but=f"the run has {world.size} {'rank' if world.size == 1 else 'ranks'}",
        hint="start a multiple of it (--num_gpus), or set it to a divisor",
    )  # fmt: skip


@contextlib.contextmanager
def _no_trace_of_a_false_start(directory: RunDirectory, world: World) -> Iterator[None]:
    """Remove what a run wrote that was refused before its first step, and nothing else."""
    existed, held = directory.path.exists(), directory.holds_run()
    try:
        yield
    except RecipeError:
        if world.is_main and not held:
            from arctic_like.logs import close_logging

            close_logging()
            directory.clear()
            if not existed:
                shutil.rmtree(directory.path, ignore_errors=True)
        raise


def _take_possession(
    recipe: Recipe, directory: RunDirectory, resume: str, *, host: HostGroup,
    stack: contextlib.ExitStack,
) -> Path | None:  # fmt: skip
    """Rank zero locks the run directory and decides what the run goes on from; all ranks learn it."""
    error: BaseException | None = None
    checkpoint: Path | None = None
    if host.world.is_main:
        try:
            stack.enter_context(directory.lock())
            checkpoint = _decide(recipe, directory, resume)
        except ArcticError as problem:
            error = problem
    host.raise_together(error)
    return host.from_main(checkpoint)


def refuse_what_cannot_run(recipe: Recipe, *, on_cpu: bool) -> None:
    """Raise RecipeError for what can be known before anything happens to go wrong.

    Keys that are declared but not built yet, settings of DeepSpeed that contradict the recipe or the
    device, data files that are not there. Light: the command asks it before it launches.
    """
    from arctic_like.engine.ds_rules import Facts, deepspeed_problems
    from arctic_like.recipe import run_time_refusals
    from arctic_like.trainer.memory import memory_problems
    from arctic_like.trainer.micro_batch import AUTO

    config = recipe.config
    problems: list[Problem] = list(run_time_refusals(config))
    facts = Facts(
        dtype=getattr(config.model, "dtype", None),
        micro_batch_size=None if config.micro_batch_size == AUTO else config.rows,
        on_cpu=on_cpu,
    )
    problems += deepspeed_problems(config.deepspeed, facts=facts)
    problems += memory_problems(config)
    refuse = getattr(recipe.trainer, "refuse", None)
    if refuse is not None:
        problems += refuse()
    missing = getattr(build(recipe.config.data, "data"), "problems", None)
    if missing is not None:
        problems += missing()
    if problems:
        raise RecipeError(problems)


def choose_device(wanted: str) -> str:
    """The torch device of this rank for the recipe's `device`. Raises RecipeError where there is none."""
    if wanted != "cpu":
        import torch

        if torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        if wanted == "cuda":
            raise RecipeError(
                Problem("is cuda, but torch sees no CUDA device", place="device",
                        hint="use device: auto or cpu, or check the driver")
            )  # fmt: skip
    return "cpu"


def _device_name(world: World) -> str:
    if world.device == "cpu":
        return "cpu"
    import torch

    return str(torch.cuda.get_device_name(world.device))


def prepare_process(recipe: Recipe, world: World) -> None:
    """Set what torch, DeepSpeed and tokenizers read from the environment when they are first used."""
    if world.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        import torch

        torch.cuda.set_device(world.device)
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if recipe.config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _decide(recipe: Recipe, directory: RunDirectory, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a start from the beginning.

    resume: "" for a start (which resumes where the recipe says `auto_resume`), "auto" or "latest"
    for the newest complete checkpoint, "best" for that with the best `metric_monitor`, "step-N", or the
    path of a checkpoint. Raises CheckpointError where there are checkpoints, and all of them damaged.
    """
    from arctic_like.checkpoint.layout import complete_checkpoints, missing_files, saved_folders
    from arctic_like.checkpoint.publish import recover, supersede_after
    from arctic_like.checkpoint.retention import best_checkpoint

    folder = checkpoints_of(recipe, directory)
    recover(folder)
    complete = complete_checkpoints(folder)
    wants = bool(resume) or (recipe.config.auto_resume and not recipe.config.overwrite)
    directory.check(resume=wants, overwrite=recipe.config.overwrite)
    damaged = {path: missing_files(path) for path in saved_folders(folder) if path not in complete}
    if resume not in ("", "auto", "latest"):
        best = best_checkpoint(folder) if resume == "best" else None
        chosen = best or (Path(resume) if Path(resume).is_absolute() else folder / resume)
        have = ", ".join(path.name for path in complete) or "none"
        if resume == "best" and best is None:
            raise CheckpointError(
                f"no checkpoint in {folder} was evaluated at its step, so none is best; complete are: {have}"
            )
        if missing := missing_files(chosen):
            raise CheckpointError(
                f"{chosen} is no complete checkpoint ({missing[0]} is missing or cut); "
                f"complete are: {have}"
            )
    elif wants and complete:
        chosen = complete[-1]
        _warn_of_damage(list(damaged), chosen)
    elif wants and damaged:
        raise CheckpointError(_all_damaged(directory, damaged))
    else:
        if directory.holds_run():
            directory.clear(folder)
        return None
    supersede_after(chosen)
    return chosen


def _warn_of_damage(damaged: list[Path], chosen: Path) -> None:
    from loguru import logger

    from arctic_like.checkpoint.layout import step_of

    newer = [path.name for path in damaged if (step_of(path) or 0) > (step_of(chosen) or 0)]
    if newer:
        logger.warning(f"{', '.join(newer)} is damaged and left alone; going on from {chosen.name}")


def _all_damaged(directory: RunDirectory, damaged: dict[Path, list[str]]) -> str:
    """Why nothing can be resumed although there are checkpoints, and the ways out."""
    told = [
        f"{path.name}: {files[0]} is missing or cut"
        + (f", and {len(files) - 1} more" if files[1:] else "")
        for path, files in damaged.items()
    ]
    return (
        f"{directory.path} has checkpoints, but none is complete\n    "
        + "\n    ".join(told)
        + "\n    put the files back, or start anew: overwrite=true, or another output_dir"
    )


def checkpoints_of(recipe: Recipe, directory: RunDirectory) -> Path:
    """Where the run's resumable checkpoints lie."""
    for entry in recipe.config.checkpoint:
        own = getattr(entry, "output_dir", None)
        if entry.type == "deepspeed" and own:
            return Path(own)
    return directory.path / "checkpoints"


def _run_trainer(
    recipe: Recipe, *, world: World, host: HostGroup, directory: RunDirectory,
    checkpoint: Path | None, stop: StopRequest, start_up: StartUp,
    inspect: Callable[[Trainer], None] | None,
) -> Result:  # fmt: skip
    from arctic_like.engine.host import PATIENCE
    from arctic_like.sequence import SequenceGroup
    from arctic_like.trainer.assembly import Session
    from arctic_like.trainer.closing import show_end
    from arctic_like.trainer.failures import is_out_of_memory, out_of_memory, outside
    from arctic_like.trainer.micro_batch import with_rows
    from arctic_like.trainer.result_file import leave_failure, leave_result, remove_result

    devices = host.gather(_device_name(world))
    sequence = SequenceGroup.of(world, timeout=PATIENCE)
    session = Session(
        recipe,
        world,
        host,
        directory,
        stop,
        resume=checkpoint,
        sequence=sequence,
        start_up=start_up,
    )
    start_up.lap("imports")
    if world.is_main:
        remove_result(directory.path)
        directory.write_recipe(recipe.dump())
        directory.write_environment(
            world_size=world.size, devices=devices,
            resumed_from=str(checkpoint) if checkpoint else None,
        )  # fmt: skip
    try:
        recipe = with_rows(recipe, session)
    except OutOfMemoryError as error:
        raise _with_a_plan(error, directory, world) from None
    session = replace(session, recipe=recipe)
    trainer: Any = recipe.trainer(recipe.config)
    try:
        trainer.setup(session)
        if inspect is not None:
            inspect(trainer)
        result = trainer.train()
        leave_result(trainer, result)
        trainer.emit("on_run_end", result)
        trainer.teardown(0)
        if world.is_main:
            show_end(trainer, result)
        return result  # type: ignore[no-any-return]
    except BaseException as error:
        told = out_of_memory(trainer, error, outside(trainer)) if is_out_of_memory(error) else error
        with contextlib.suppress(Exception):
            leave_failure(trainer, told)
        trainer.teardown(1, told)
        if isinstance(told, OutOfMemoryError):
            raise _with_a_plan(told, directory, world) from None
        raise


def _with_a_plan(
    error: OutOfMemoryError, directory: RunDirectory, world: World
) -> OutOfMemoryError:
    """The error with what the recipe takes and what would make it fit. Takes up to two minutes."""
    from loguru import logger

    from arctic_like.planning.failure import (
        LIMIT,
        is_first_to_plan,
        plan_for_failure,
        wait_for_the_planner,
    )

    if not is_first_to_plan():
        wait_for_the_planner()
        return error
    logger.warning(f"out of memory: planning what the recipe takes, for up to {LIMIT:.0f} s")
    memory: float | None = None
    if world.device != "cpu":
        import torch

        memory = float(torch.cuda.get_device_properties(world.device).total_memory)
    page = plan_for_failure(directory.path, ranks=world.size, memory=memory)
    return OutOfMemoryError(f"{error}\n\n{page}")


def recipe_from_environment() -> tuple[Recipe, Path, str]:
    """What the command told this worker: the recipe, the run directory and what to resume."""
    from arctic_like.recipe import load_recipe

    recipe = load_recipe(
        Path(os.environ["ARCTIC_RECIPE"]), json.loads(os.environ.get("ARCTIC_OVERRIDES", "[]"))
    )
    return recipe, Path(os.environ["ARCTIC_OUTPUT_DIR"]), os.environ.get("ARCTIC_RESUME", "")
