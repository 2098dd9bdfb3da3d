"""`arctic-train cache`: what prepared data lies where, and its removal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arctic_like.cli.quantities import age, count, parse_age, size
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    from arctic_like.data.inventory import Entry

_KEY_LENGTH = 8
_TITLE = 30

_ROOT = click.option(
    "--root", type=click.Path(path_type=Path), metavar="DIR",
    help="The cache's folder: a recipe's data.cache_dir; by default $ARCTIC_LIKE_CACHE, else "
    "~/.cache/arctic_like.",
)  # fmt: skip


@click.group(
    name="cache",
    invoke_without_command=True,
    options_metavar="[--root DIR]",
    subcommand_metavar="[remove …]",
    context_settings={"max_content_width": 80},
)
@_ROOT
@click.pass_context
def command(context: click.Context, root: Path | None) -> int:
    """List prepared data: what it was made from, its size, and when it was last used.

    `documents` are tokenised sources, `samples` say how they are cut and packed.
    """
    context.obj = root
    if context.invoked_subcommand is None:
        listed = _entries(_root(root))
        click.echo("\n".join(listing(listed, where=_root(root), now=time.time())))
    return 0


@command.command(name="remove", context_settings={"max_content_width": 80})
@click.argument("keys", nargs=-1, metavar="[KEY]…")
@click.option("--older-than", "older", metavar="AGE", help="Not used for so long: 12h, 30d, 2w.")
@click.option("--unused", is_flag=True, help="What no run can use: left by a killed preparation, "
              "or made by another version.")  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="All entries.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_ROOT
@click.pass_context
def remove(
    context: click.Context, keys: tuple[str, ...], *, older: str | None, unused: bool,
    everything: bool, yes: bool, root: Path | None,
) -> int:  # fmt: skip
    """Remove entries by their KEYs (the first digits are enough), or by what is true of them.

    What a process prepares right now stays, and so does whatever is not the cache's own.
    """
    from arctic_like.data import inventory

    if sum((bool(keys), older is not None, unused, everything)) != 1:
        raise click.UsageError("name KEYs, or one of --older-than, --unused and --all")
    if not yes and not is_interactive():
        raise click.UsageError("nobody is there to ask: add --yes to remove without asking")
    folder = _root(root or context.obj)
    listed = _entries(folder)
    if keys:
        wanted = [_named(key, listed) for key in keys]
    else:
        least = _seconds(older) if older is not None else 0.0
        own = [entry for entry in listed if entry.state in ("complete", "incomplete")]
        wanted = [
            entry for entry in own
            if everything or (unused and _useless(entry))
            or (older is not None and time.time() - entry.used >= least)
        ]  # fmt: skip
    if not wanted:
        click.echo(f"{folder}: there is no such entry")
        return 0
    click.echo("\n".join(listing(wanted, where=folder, now=time.time())))
    if not yes and not click.confirm("Remove them?"):
        click.echo("nothing was removed")
        return 0
    removed = [entry for entry in wanted if inventory.remove(folder, entry)]
    freed = sum(entry.size for entry in removed)
    click.echo(f"removed {len(removed):,} of {len(wanted):,} entries, {size(freed)}")
    busy = [entry.name for entry in wanted if entry not in removed]
    if busy and keys:
        raise RunError(f"{', '.join(busy)}: a process prepares it right now; try again later")
    return 0


def is_interactive() -> bool:
    """Whether a person can answer."""
    return sys.stdin.isatty()


def listing(entries: list[Entry], *, where: Path, now: float) -> list[str]:
    """A table of at most 80 columns (but for the folder's name), and its sum."""
    if not entries:
        return [f"{where}: no prepared data"]
    digits = _digits(entries)
    lines = [str(where)]
    kind = ""
    for entry in entries:
        if entry.kind != kind:
            kind = entry.kind
            lines.append(
                f"{kind:<{digits + 4 + _TITLE}}{'documents':>10}{'tokens':>8}{'size':>9}{'used':>8}"
            )
        lines.append(_row(entry, digits, now))
    total = sum(entry.size for entry in entries)
    number = f"{len(entries):,} entr{'y' if len(entries) == 1 else 'ies'}"
    return [*lines, f"{number}, {size(total)}"]


def _row(entry: Entry, digits: int, now: float) -> str:
    documents, tokens = (entry.facts.get(name) for name in ("documents", "tokens"))
    key = entry.key if entry.state == "foreign" else entry.key[:digits]
    return (
        f"  {key[:digits]:<{digits}}  {_fit(_title(entry), _TITLE):<{_TITLE}}"
        f"{'' if documents is None else count(documents):>10}"
        f"{'' if tokens is None else count(tokens):>8}"
        f"{size(entry.size):>9}{age(now - entry.used):>8}"
    )


def _title(entry: Entry) -> str:
    if entry.state == "preparing":
        return "(being prepared)"
    if entry.state == "incomplete":
        return "(incomplete: left behind)"
    if entry.state == "foreign":
        return "(not the cache's)"
    return f"(version {entry.version or 1}) {entry.title}" if entry.is_old else entry.title


def _fit(text: str, width: int) -> str:
    """A text that is too wide loses its start: the end of a path says more."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text)
    return clean if len(clean) <= width else "…" + clean[len(clean) - width + 1 :]


def _digits(entries: list[Entry]) -> int:
    """How many digits of the keys tell them apart."""
    keys = {entry.name for entry in entries}
    for digits in range(_KEY_LENGTH, 32):
        if len({f"{entry.kind}/{entry.key[:digits]}" for entry in entries}) == len(keys):
            return digits
    return 32


def _useless(entry: Entry) -> bool:
    return entry.state == "incomplete" or entry.is_old


def _named(key: str, entries: list[Entry]) -> Entry:
    """The one entry whose key, or `kind/key`, begins so."""
    found = [
        entry
        for entry in entries
        if key and (entry.key.startswith(key) or entry.name.startswith(key))
    ]
    if not found:
        raise RecipeError(
            Problem(f"no entry's key begins with {key!r}", hint="arctic-train cache lists them")
        )
    if len(found) > 1:
        names = ", ".join(entry.name[: len(entry.kind) + 13] for entry in found[:4])
        raise RecipeError(
            Problem(f"{key!r} is the beginning of several keys: {names}", hint="write more of it")
        )
    if found[0].state == "foreign":
        raise RecipeError(
            Problem(f"{found[0].name} is none of the cache's entries",
                    hint="remove it by hand if you know what it is")
        )  # fmt: skip
    return found[0]


def _seconds(text: str) -> float:
    try:
        return parse_age(text)
    except ValueError:
        raise click.UsageError(f"--older-than takes an age (12h, 30d, 2w), not {text!r}") from None


def _root(given: Path | None) -> Path:
    from arctic_like.data import cache

    return cache.root(given)


def _entries(root: Path) -> list[Entry]:
    from arctic_like.data import inventory

    if root.exists() and not root.is_dir():
        raise RecipeError(Problem("is no folder", file=str(root), place="--root"))
    return inventory.entries(root)
