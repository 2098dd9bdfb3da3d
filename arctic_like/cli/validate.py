"""`arctic-train validate RECIPE [key=value …]`: everything that can be known without running."""

from __future__ import annotations

import click

from arctic_like.cli.show import show_problems
from arctic_like.cli.startup import without_pydantic_plugins


@click.command(name="validate", context_settings={"max_content_width": 80})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--print", "wants_dump", is_flag=True, help="Print the resolved recipe.")
def command(recipe: str, overrides: tuple[str, ...], wants_dump: bool) -> int:
    """Check a recipe without running it: nothing is loaded, opened or written."""
    with without_pydantic_plugins():
        from arctic_like.recipe import load_recipe, run_time_refusals, warnings

        loaded = load_recipe(recipe, overrides)
    show_problems(warnings(loaded.config), kind="warning")
    refused = [*run_time_refusals(loaded.config), *getattr(loaded.trainer, "refuse", list)()]
    show_problems(refused, kind="warning")
    if wants_dump:
        click.echo(loaded.dump(), nl=False)
    elif refused:
        click.echo(f"{recipe} is valid; this version cannot run it yet")
    else:
        click.echo(f"{recipe} is valid (trainer {loaded.config.type})")
    return 0
