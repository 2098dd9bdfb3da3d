"""`arctic-train list [family]`: what a recipe can name by `type:`."""

from __future__ import annotations

from pathlib import Path

import click

from arctic_like import registry
from arctic_like.errors import Problem, RecipeError


@click.command(name="list", context_settings={"max_content_width": 80})
@click.argument("family", required=False)
@click.option("--code", "code", metavar="FILE", help="A file with parts of your own.")
def command(family: str | None, code: str | None) -> int:
    """List what a recipe can name by `type:`, of one FAMILY (trainer, data, model …) or of all.

    Installed plug-ins are included.
    """
    from arctic_like.recipe.code import import_code
    from arctic_like.registry.plugins import load_plugins

    load_plugins()
    if code:
        import_code(Path(code))
    known = registry.families()
    if family is not None and family not in known:
        near = registry.nearest(family, known)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
        raise RecipeError(Problem(f"there is no family {family!r}", hint=hint))
    for name in [family] if family else known:
        click.secho(name, bold=True)
        formatter = click.HelpFormatter(indent_increment=2, width=80)
        formatter.indent()
        rows = [(entry, registry.summary(part)) for entry, part in registry.members(name).items()]
        if rows:
            formatter.write_dl(rows)
        click.echo(formatter.getvalue() or "  (none)\n", nl=not family)
    return 0
