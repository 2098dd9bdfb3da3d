"""What each process of `arctic-train evaluate` runs: it builds the recipe's trainer and measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from arctic_like.cli.evaluate import REQUEST, RESULT
from arctic_like.errors import DONE, FAILED, Problem, RecipeError, RunError
from arctic_like.stop import StopRequest
from arctic_like.worker import exit_code, run_as_rank


class _Stopped(Exception):
    """A signal asked to stop; `args[0]` is its number."""


def main() -> int:
    """Measure on this rank; returns its exit code."""
    from arctic_like.api import recipe_from_environment

    def work() -> int:
        recipe, folder, _ = recipe_from_environment()
        try:
            measure(recipe, folder)
        except _Stopped as stopped:
            return 128 + int(stopped.args[0])
        return DONE

    return exit_code(work)


def measure(recipe: Any, folder: Path) -> None:
    """Build, load, evaluate, test; rank zero writes what came of it into `folder`. Collective."""
    from arctic_like.api import choose_device, prepare_process
    from arctic_like.engine.host import connect
    from arctic_like.logs import setup_logging
    from arctic_like.rundir import RunDirectory
    from arctic_like.trainer.assembly import Session
    from arctic_like.trainer.result_file import as_json
    from arctic_like.world import World

    world = World.from_environment(choose_device(recipe.config.device))
    prepare_process(recipe, world)
    host = connect(world)
    logger = recipe.config.logger
    setup_logging(rank=world.rank, level=logger.level, print_output_ranks=logger.print_output_ranks)
    weights = json.loads((folder / REQUEST).read_text())["weights"]
    stop = StopRequest.from_environment()
    session = Session(recipe, world, host, RunDirectory(folder), stop)
    trainer: Any = recipe.trainer(recipe.config)
    try:
        trainer.setup(session)
        _check(trainer.equipment.data)
        _heed(trainer, stop)
        if weights:
            trainer.equipment.saver.load_weights(trainer, Path(weights))
            trainer.emit("on_weights_loaded", Path(weights))
        values = {**trainer.evaluate(), **trainer.test()}
    except BaseException as error:
        trainer.teardown(FAILED, error)
        raise
    if world.is_main:
        found = {"ranks": world.size, "sets": by_set(values, sizes(trainer.equipment.data))}
        (folder / RESULT).write_text(as_json(found))
    trainer.teardown(DONE)


def _check(data: Any) -> None:
    if not data.evaluation and not data.test:
        raise RecipeError(
            Problem("has neither an evaluation set nor a test set", place="data",
                    hint="name one: data.eval_sources, data.train_eval_split or data.test_sources "
                    "(data.evaluation, data.test for data: {type: torch})")
        )  # fmt: skip


def _heed(trainer: Any, stop: StopRequest) -> None:
    """End between two batches where a signal asks for it; there is nothing to save."""
    moment = trainer.on_evaluate_batch_end

    def look(*values: Any) -> None:
        moment(*values)
        if number := stop.requested():
            raise _Stopped(number)

    trainer.on_evaluate_batch_end = look


def sizes(data: Any) -> dict[str, int]:
    """A set's name in the metrics → its number of samples."""
    found = {}
    for kind, sets in ("eval", data.evaluation), ("test", data.test):
        for name, samples in sets.items():
            found[kind if name in ("", kind) else f"{kind}/{name}"] = len(samples)
    return found


def by_set(values: dict[str, float], samples: dict[str, int]) -> dict[str, dict[str, Any]]:
    """The numbers of each set by their names; those of no set (a callback's) by their first word."""
    found: dict[str, dict[str, Any]] = {
        label: {"samples": count, "values": {}} for label, count in samples.items()
    }
    for name, value in values.items():
        fitting = [label for label in samples if name.startswith(f"{label}/")]
        label = max(fitting, key=len) if fitting else name.partition("/")[0]
        its = found.setdefault(label, {"samples": None, "values": {}})
        its["values"][name.removeprefix(f"{label}/")] = value
    if not any(its["values"] for its in found.values()):
        raise RunError("the evaluation and test sets gave no number: their steps return none")
    return found


if __name__ == "__main__":
    run_as_rank(main)
