"""`arctic-train profile RECIPE`: some steps of a recipe, measured; what holds them up, on one page."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from arctic_like.cli.evaluate import QUIET, take_options
from arctic_like.cli.train import Words, check_before_launch, read_recipe, split_words
from arctic_like.errors import Problem, RecipeError

WORKER = "arctic_like.cli.profile_worker"
REQUEST = "profile-request.json"
WARM_UP = 3
"""Steps before those that are measured: memory is allocated, kernels are chosen, states are made."""


@click.command(
    cls=Words,
    name="profile",
    options_metavar="RECIPE [key=value …] [--steps N] [--output DIR] [launcher options]",
    context_settings={"max_content_width": 80},
)
def command(words: list[str]) -> int:
    """Run a few steps of a recipe and say where their time goes.

    After a warm-up --steps N (5) are timed as they are, and as many again are traced.
    Writes profile.md, profile.json and a trace for chrome://tracing or Perfetto into a
    folder of its own (--output DIR, else runs/RECIPE-profile-TIME). Saves no checkpoint,
    evaluates nothing, tells no tracker, and touches no run.
    """
    spoken = ["arctic-train", "profile", *words]
    words, own = take_options(words, ("--steps", "--output"))
    if not words or words[0].startswith("-"):
        raise click.UsageError("name a recipe: arctic-train profile RECIPE [--steps N]")
    steps = own.get("--steps", "5")
    if not steps.isdigit() or int(steps) < 1:
        raise click.UsageError(f"--steps takes a number of steps, not {steps!r}")
    line = split_words(words)
    source = Path(line.target)
    file = source / "recipe.yaml" if source.is_dir() else source
    overrides = [*line.overrides, *quiet(WARM_UP + 2 * int(steps))]
    recipe = read_recipe(file, overrides)
    check_before_launch(recipe)
    name = f"{recipe.name}-profile-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(own["--output"]) if "--output" in own else Path("runs") / name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(
            Problem(f"{folder} is there already", "--output", "name a folder that is new or empty")
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REQUEST).write_text(json.dumps({"steps": int(steps), "recipe": recipe.name}))
    from arctic_like.cli.launch import launch

    try:
        code = launch(
            recipe, overrides=overrides, launcher_options=line.launcher_options, output_dir=folder,
            resume="", argv=spoken, worker_module=WORKER,
        )  # fmt: skip
    finally:
        (folder / REQUEST).unlink(missing_ok=True)
    page = folder / "profile.md"
    if code == 0 and page.is_file():
        click.echo(page.read_text())
        click.echo(f"wrote {folder}/profile.md, profile.json and the traces")
    return code


def quiet(steps: int) -> list[str]:
    """What makes a recipe run so many steps and nothing else, with a line at the end alone."""
    return [
        *QUIET, "overwrite=false", "eval_interval=0", "eval_at_start=false",
        "eval_at_end=false", "test_at_end=false", f"min_iterations={steps}",
        f"exit_iteration_this_run={steps}", "exit_iteration=0", "train_log_iter_interval=0",
        "mem_profiler=null",
    ]  # fmt: skip
