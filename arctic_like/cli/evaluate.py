"""`arctic-train evaluate RUN_DIR …`: a model on a recipe's evaluation and test sets; no training."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_like.cli.train import Words, split_words
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.recipe import Recipe

WORKER = "arctic_like.cli.evaluate_worker"
REQUEST, RESULT = "request.json", "result.json"
"""What the command tells the ranks and what rank zero answers, in the run's private folder."""

OPTIONS = ("--model", "--step", "--output", "--harness")
QUIET = ("trackers=[]", "wandb.enable=false", "checkpoint=[]", "exporters=[]", "test_only=false",
         "train_log_metrics_path=null", "kill_switch_path=null", "logger.output_dir=null")  # fmt: skip
"""What would write elsewhere, save, or end before the evaluation sets."""


@dataclass(frozen=True)
class Weights:
    """The weights that are measured."""

    path: Path | None = None
    """A folder or file that fills the model once it is built; None: the model is right as built."""
    overrides: list[str] = field(default_factory=list)
    """Changes to the recipe by which it builds them."""
    source: str = "as the recipe begins"
    """For people."""
    step: int | None = None


@click.command(
    cls=Words,
    name="evaluate",
    options_metavar="RECIPE|RUN_DIR [key=value …] [--model PATH] [--step N] [--output FILE] "
    "[--harness TASKS] [launcher options]",
    context_settings={"max_content_width": 80},
)
def command(words: list[str]) -> int:
    """Measure a model on a recipe's evaluation and test sets.

    Of a run directory its newest weights, or those of --step N or --step best. Of a
    recipe the model that it begins with. --model PATH measures others: an export, a
    model's folder, a checkpoint, a file of weights.

    Prints a table and writes evaluation.json, into the run directory, or here for a recipe.

    --harness arc_easy,hellaswag runs tasks of lm-evaluation-harness (the extra
    `harness`) in place of the recipe's sets, on the model of a run directory or a
    model's folder; key=value is then for the harness: limit=100, num_fewshot=5. Writes
    harness.json.
    """
    spoken = ["arctic-train", "evaluate", *words]
    words, own = take_options(words, OPTIONS)
    if not words or words[0].startswith("-"):
        raise click.UsageError("name a recipe or a run directory: arctic-train evaluate RUN_DIR")
    line = split_words(words)
    source = Path(line.target)
    if "--harness" in own:
        return _by_harness(source, line, own, argv=spoken)
    is_run = source.is_dir()
    weights = find_weights(source, model=own.get("--model"), step=own.get("--step"))
    file = source / "recipe.yaml" if is_run else source
    overrides = [*line.overrides, *QUIET, *weights.overrides]
    recipe = _load(file, overrides)
    target = Path(own["--output"]) if "--output" in own else None
    target = target or (source if is_run else Path()) / "evaluation.json"
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".evaluation-", dir=target.absolute().parent))
    try:
        path = str(weights.path.absolute()) if weights.path else None
        (scratch / REQUEST).write_text(json.dumps({"weights": path}))
        code = _launch(recipe, overrides, line.launcher_options, scratch, argv=spoken)
        if code or not (scratch / RESULT).is_file():
            return code or 1
        found = json.loads((scratch / RESULT).read_text())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    facts = {
        "recipe": str(file.absolute()), "overrides": line.overrides, "weights": weights.source,
        "step": weights.step, "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip
    write(target, {**facts, **found})
    show(found["sets"], weights=weights.source, target=target)
    return 0


def _by_harness(source: Path, line: Any, own: Mapping[str, str], *, argv: list[str]) -> int:
    from arctic_like.cli import harness

    if line.launcher_options:
        raise click.UsageError(
            f"{line.launcher_options[0]} is the launcher's; the harness runs in one process"
        )
    return harness.measure(
        Path(own.get("--model", source)), harness.read_request(own["--harness"], line.overrides),
        step=own.get("--step"), target=Path(own["--output"]) if "--output" in own else None,
        argv=argv,
    )  # fmt: skip


def take_options(words: Sequence[str], options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """A verb's own options, `--model PATH` or `--model=PATH`, wherever they stand; the rest as it was."""
    rest: list[str] = []
    own: dict[str, str] = {}
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name not in options:
            rest.append(word)
            continue
        own[name] = value if equals else next(left, "")
        if not own[name]:
            raise click.UsageError(f"{name} needs a value")
    return rest, own


def find_weights(source: Path, *, model: str | None, step: str | None) -> Weights:
    """What is to be measured. Raises RecipeError where there is nothing."""
    from arctic_like.checkpoint.layout import step_of
    from arctic_like.cli.export import check_step
    from arctic_like.inference import find

    chosen = check_step(step)
    if model is None and not source.is_dir():
        if chosen is not None:
            raise RecipeError(
                Problem("is given, but a recipe has no steps", place="--step",
                        hint="give a run directory, or the weights by --model")
            )  # fmt: skip
        return Weights()
    place = source if model is None else Path(model)
    if place.is_file():
        return Weights(path=place, source=str(place))
    found = find(place, step=chosen)
    at = step_of(found.folder)
    if found.is_adapter:  # its base is the recipe's
        adapter = [f"model.adapter={json.dumps(str(found.folder.absolute()))}"]
        return Weights(
            overrides=[*adapter, "model.peft_config=null"], source=str(found.folder), step=at
        )
    return Weights(path=found.folder, source=str(found.folder), step=at)


def _load(file: Path, overrides: list[str]) -> Recipe:
    from arctic_like.cli.train import check_before_launch, read_recipe

    recipe = read_recipe(file, overrides)
    check_before_launch(recipe)
    return recipe


def _launch(
    recipe: Recipe, overrides: list[str], options: list[str], scratch: Path, *, argv: list[str]
) -> int:
    from arctic_like.cli.launch import launch

    return launch(
        recipe, overrides=overrides, launcher_options=options, output_dir=scratch, resume="",
        argv=argv, worker_module=WORKER,
    )  # fmt: skip


def write(target: Path, content: Mapping[str, Any]) -> None:
    """Write `evaluation.json`, at once; an infinite number stands there as `1e999`."""
    from arctic_like.rundir import write_atomically
    from arctic_like.trainer.result_file import as_json

    write_atomically(target, as_json(dict(content)))


def show(sets: Mapping[str, Mapping[str, Any]], *, weights: str, target: Path) -> None:
    """The table: a row for each set, a column for each number."""
    from rich.table import Table

    from arctic_like.logs import console

    names = list(dict.fromkeys(name for its in sets.values() for name in its["values"]))
    table = Table("", "samples", *names, box=None, header_style="bold", padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, its in sets.items():
        shown = [f"{its['values'][n]:.5g}" if n in its["values"] else "-" for n in names]
        count = "-" if its["samples"] is None else f"{its['samples']:,}"
        table.add_row(label, count, *shown)
    console().print()
    console().print(table)
    console().print()
    console().print(f"weights  {weights}\nwrote    {target}", markup=False, soft_wrap=True)
