"""`arctic-train plan RECIPE [key=value …]`: what a run will take, before the run."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from arctic_like.errors import WRONG, Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.planning.advice import Change
    from arctic_like.planning.plan import Machine, Plan
    from arctic_like.planning.rehearsal import Prepared
    from arctic_like.recipe import Recipe


@click.command(name="plan", context_settings={"max_content_width": 80})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--gpus", type=click.IntRange(min=1), help="Ranks, one for each GPU.")
@click.option("--ranks", type=click.IntRange(min=1), help="Ranks on the CPU.")
@click.option("--gpu-memory", help="Memory of one, such as 80GiB.")
@click.option("--device", help="A GPU by its name, such as h100.")
@click.option("--no-data", is_flag=True, help="Prepare nothing: every sample as long as can be.")
@click.option("--suggest", is_flag=True, help="Print the recipe that fits.")
@click.option("--json", "as_json", is_flag=True, help="Print numbers for programs.")
def command(
    recipe: str, overrides: tuple[str, ...], *, gpus: int | None, ranks: int | None,
    gpu_memory: str | None, device: str | None, no_data: bool, suggest: bool, as_json: bool,
) -> int:  # fmt: skip
    """Say what a recipe takes: memory by kind, steps, tokens, time.

    Needs no GPU and no weights. Ends with 0 where it fits, with 2 where it does not.
    """
    from arctic_like.cli import preparation
    from arctic_like.planning.page import page

    machine = _machine(gpus, ranks, gpu_memory, device)
    loaded = preparation.load(recipe, list(overrides))
    prepared = _prepared(loaded, machine, no_data=no_data)

    def plan_of(words: tuple[str, ...]) -> Plan:
        from arctic_like.planning.plan import make_plan

        changed = preparation.load(recipe, [*overrides, *words]) if words else loaded
        with _shown(words), _quiet():
            return make_plan(changed, prepared, machine, knows_data=not no_data)

    plan = plan_of(())

    def advise() -> tuple[Change, Plan] | None:
        from arctic_like.planning.advice import cheapest

        return cheapest(loaded.config, machine, plan_of)

    if not as_json and not suggest:
        for line in page(recipe, plan, advise):
            click.echo(line)
        return 0 if plan.fits else WRONG
    advice = None if plan.fits else advise()
    if as_json:
        click.echo(json.dumps(_numbers(plan, advice), indent=2))
    elif suggest and (plan.fits or advice):
        words = advice[0].overrides if advice else ()
        click.echo(preparation.load(recipe, [*overrides, *words]).dump(), nl=False)
    else:
        click.echo("\n".join(page(recipe, plan, lambda: advice)))
    return 0 if plan.fits or (suggest and advice) else WRONG


def _machine(
    gpus: int | None, ranks: int | None, gpu_memory: str | None, device: str | None
) -> Machine:
    from arctic_like.planning.devices import device_of
    from arctic_like.planning.plan import Machine

    named = device_of(device) if device else None
    on_gpu = bool(named or gpu_memory or gpus)
    if ranks and on_gpu:
        raise RecipeError(
            Problem(
                "is for ranks on the CPU", "--ranks", "say --gpus for ranks that have a GPU each"
            )
        )
    memory = _bytes(gpu_memory) if gpu_memory else named.memory if named else None
    return Machine(gpus or ranks or 1, on_gpu, named, memory)


def _bytes(text: str) -> float:
    from arctic_like.config.values import parse_number

    number = text.strip().removesuffix("B").removesuffix("b")
    try:
        found = float(parse_number(number))
    except ValueError:
        found = 0.0
    if found < 2**20:
        raise RecipeError(
            Problem(f"{text!r} is no size of a memory", "--gpu-memory", "write 80GiB or 80GB")
        )
    return found


def _prepared(recipe: Recipe, machine: Machine, *, no_data: bool) -> Prepared:
    from arctic_like.planning.rehearsal import Prepared, world_of

    world_of(recipe.config, machine.ranks)  # refuses what no data would make possible
    if no_data:
        from arctic_like.planning.worst_case import worst_case

        return worst_case(recipe.config, ranks=machine.ranks)
    if getattr(recipe.config.data, "streaming", False):
        raise RecipeError(
            Problem("is true: a stream's samples are made while training", "data.streaming",
                    "plan with --no-data")
        )  # fmt: skip
    from arctic_like.cli.preparation import prepare

    done = prepare(recipe, level=recipe.config.logger.level)
    return Prepared(done.tokenizer, done.data)


def _numbers(plan: Plan, advice: tuple[Change, Plan] | None) -> dict[str, Any]:
    found = plan.as_dict()
    if advice:
        change, better = advice
        found["cheapest_change"] = {
            "overrides": list(change.overrides), "price": change.price,
            "peak": better.rehearsal.device.total,
        }  # fmt: skip
    return found


@contextlib.contextmanager
def _shown(words: tuple[str, ...]) -> Iterator[None]:
    """On a terminal's standard error, what is rehearsed and for how long: a model of 8B takes a minute."""
    import sys

    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(f"rehearsing {' '.join(words) or 'the recipe'}", total=None)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what DeepSpeed and torch say of tensors that have no memory."""
    import logging

    from loguru import logger

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    logger.disable("arctic_like")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.enable("arctic_like")
        logging.disable(before)
