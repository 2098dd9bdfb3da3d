"""`arctic-train preprocess RECIPE [key=value …]`: the data of a run, before the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from arctic_like.cli import preparation
from arctic_like.cli.quantities import size

if TYPE_CHECKING:
    from arctic_like.cli.preparation import Preparation


@click.command(name="preprocess", context_settings={"max_content_width": 80})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--verify", is_flag=True, help="Read the content of every file, also of those that "
              "look unchanged by size, time and inode.")  # fmt: skip
def command(recipe: str, overrides: tuple[str, ...], *, verify: bool) -> int:
    """Tokenise and pack a recipe's data into the cache, where a run finds it.

    Needs no GPU, no weights and no ranks. Stopped with Ctrl-C or killed, the same command goes on.
    """
    loaded = preparation.load(recipe, list(overrides), verify=verify)
    try:
        done = preparation.prepare(loaded, level=loaded.config.logger.level)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on", err=True)
        raise
    if done.data.report:
        click.echo(done.data.report)
    click.echo("\n".join(where(done)))
    return 0


def where(done: Preparation) -> list[str]:
    """What lies in the cache for this recipe, and what of it is new."""
    from arctic_like.data import inventory
    from arctic_like.data.inspection import named_sets

    sets = named_sets(done.data).values()
    used: list[Path] = sorted({path for samples in sets for path in samples.entries()})
    if not used:
        return ["nothing of this data is kept in a cache: it is read when a run starts"]
    lines = [f"in {used[0].parent.parent}:"]
    for path in used:
        entry = inventory.entry_at(path)
        found = "found" if path in done.there else "made"
        name = f"{entry.kind}/{entry.key[:8]}"
        lines.append(f"  {found:<5}  {name:<18}  {size(entry.size):>7}  {entry.title}".rstrip())
    return lines
