"""`arctic-train schema`: the JSON Schema of recipes."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(name="schema", context_settings={"max_content_width": 80})
@click.option("-o", "--output", metavar="FILE", help="Write it to a file instead.")
@click.option("--code", "code", metavar="FILE", help="A file with parts of your own.")
def command(output: str | None, code: str | None) -> int:
    """Print the JSON Schema of recipes, for an editor to complete and check them.

    \b
    With the YAML extension of VS Code, for one recipe, as its first line:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from arctic_like.recipe.code import import_code
    from arctic_like.recipe.schema import recipe_schema

    if code:
        import_code(Path(code))
    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
    if output is None:
        click.echo(text)
        return 0
    try:
        Path(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"{output} cannot be written: {error.strerror}") from None
    click.echo(f"written: {output}", err=True)
    return 0
