"""`arctic-train init [trainer]`: a commented recipe to start from."""

from __future__ import annotations

from pathlib import Path

import click

from arctic_like.errors import Problem, RecipeError


@click.command(name="init", context_settings={"max_content_width": 80})
@click.argument("trainer", default="sft")
@click.option("--code", "code", metavar="FILE", help="A file with a trainer of your own.")
def command(trainer: str, code: str | None) -> int:
    """Print a commented recipe for a TRAINER (sft unless given) with all its keys.

    \b
      arctic-train init sft > my.yaml
    """
    from arctic_like import registry
    from arctic_like.recipe.code import import_code
    from arctic_like.recipe.starter import starting_recipe

    if code:
        import_code(Path(code))
    try:
        part = registry.lookup("trainer", trainer)
    except KeyError:
        hint = registry.unknown("trainer", trainer)
        raise RecipeError(Problem(f"there is no trainer {trainer!r}", hint=hint)) from None
    click.echo(starting_recipe(part), nl=False)
    return 0
