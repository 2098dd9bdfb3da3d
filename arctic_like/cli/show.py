"""Sentences on the terminal: errors and warnings, folded to the terminal's width, at most 100
columns."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable

import click

from arctic_like.errors import ArcticError, Problem, RecipeError


def show_error(error: ArcticError) -> None:
    """Print an expected error on stderr: each problem on lines of its own, the way out indented."""
    if not isinstance(error, RecipeError):
        click.echo(f"error: {error}", err=True)
        return
    show_problems(error.problems)
    if len(error.problems) > 1:
        click.echo(f"{len(error.problems)} problems", err=True)


def show_problems(problems: Iterable[Problem], *, kind: str = "error") -> None:
    """Print problems on stderr as errors or as warnings."""
    colour = "red" if kind == "error" else "yellow"
    for problem in problems:
        head, *rest = str(problem).split("\n")
        lines = [*_folded(f"{kind}: {head}", "    "), *(x for line in rest for x in _folded(line))]
        lines[0] = click.style(f"{kind}:", fg=colour, bold=True) + lines[0].removeprefix(f"{kind}:")
        for line in lines:
            click.echo(line, err=True)


def _folded(line: str, indent: str | None = None) -> list[str]:
    """One line folded at spaces; a line that points at a column (`^`) or shows code stays as it
    is."""
    width = min(shutil.get_terminal_size().columns, 100)
    before = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line,
        width,
        subsequent_indent=before if indent is None else indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    ) or [line]
