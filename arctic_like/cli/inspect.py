"""`arctic-train inspect RECIPE [key=value …]`: samples as the model will see them, and numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arctic_like.cli import preparation
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from arctic_like.cli.inspect_text import Line
    from arctic_like.data.base import PreparedData, SampleSet
    from arctic_like.data.decoding import TokenText
    from arctic_like.data.inspection import SampleView, Statistics


@click.command(name="inspect", context_settings={"max_content_width": 80})
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--set", "name", default="train", show_default=True, metavar="NAME",
              help="`train`, or the name of an evaluation set.")  # fmt: skip
@click.option("--samples", "number", type=click.IntRange(min=0), default=3, show_default=True,
              help="How many samples to show.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which samples are drawn.")
@click.option("--index", "indices", type=click.IntRange(min=0), multiple=True, metavar="I",
              help="Show this sample; may be given again.")  # fmt: skip
@click.option("--html", "page", type=click.Path(path_type=Path), metavar="FILE",
              help="Write it as one page instead.")  # fmt: skip
def command(
    recipe: str, overrides: tuple[str, ...], *, name: str, number: int, seed: int,
    indices: tuple[int, ...], page: Path | None,
) -> int:  # fmt: skip
    """Show samples as the model will see them, and numbers of a set.

    What is trained is green, or stands in ⟦…⟧ where there are no colours. Prepares the data as a
    run would, if it is not prepared yet.
    """
    from arctic_like.data import inspection
    from arctic_like.data.decoding import TokenText

    loaded = preparation.load(recipe, list(overrides))
    _check_folder(page)
    if name == "train" and getattr(loaded.config.data, "streaming", False):
        raise RecipeError(
            Problem("is on: samples of a stream are not known before they are read",
                    place="data.streaming", hint="add data.streaming=false and read a slice of the "
                    "source (name:train[:1000]), or --set an evaluation set")
        )  # fmt: skip
    level = loaded.config.logger.level if sys.stdout.isatty() else "WARNING"
    done = preparation.prepare(loaded, level=level)
    samples = _set(done.data, name)
    _check_tokens(samples, done.tokenizer)
    text = TokenText(done.tokenizer)
    wanted = _indices(indices, samples) or inspection.chosen(len(samples), number, seed)
    found = inspection.statistics(done.data, name)
    views = (inspection.view(samples, index, text) for index in wanted)
    if page is not None:
        from arctic_like.cli import inspect_page

        content = inspect_page.page(loaded.name, found, list(views), len(samples))
        try:
            page.write_text(content, encoding="utf-8")
        except OSError as error:
            raise RunError(f"--html: {page} cannot be written: {error.strerror}") from None
        click.echo(f"written: {page}", err=True)
        return 0
    _show(found, views, size=len(samples), text=text)
    return 0


def _show(found: Statistics, views: Iterator[SampleView], *, size: int, text: TokenText) -> None:
    from arctic_like.cli import inspect_text

    console = _coloured()

    def lines() -> Iterator[Line]:
        yield from inspect_text.statistics_lines(found)
        yield []
        if console is None:
            yield [(inspect_text.PLAIN_LEGEND, "")]
        else:
            yield inspect_text.LEGEND
        for sample in views:
            yield []
            yield from inspect_text.sample_lines(
                sample, size, coloured=console is not None, names=text.special.values()
            )

    inspect_text.write(lines(), console)


def _coloured() -> Console | None:
    """The console, if it shows colours and the user has not declined them."""
    from arctic_like.logs import console

    found = console()
    if not found.is_terminal or found.no_color or found.color_system is None:
        return None
    return found


def _set(data: PreparedData, name: str) -> SampleSet:
    from arctic_like.data.inspection import named_sets
    from arctic_like.registry import nearest

    sets = named_sets(data)
    if name not in sets:
        near = nearest(name, sets)
        hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(sets)}"
        raise RecipeError(Problem(f"there is no set {name!r}", place="--set", hint=hint))
    return sets[name]


def _check_tokens(samples: SampleSet, tokenizer: object) -> None:
    needed = {"input_ids", "labels", "position_ids"}
    first = samples[0] if len(samples) else None
    if tokenizer is None or not isinstance(first, dict) or not needed <= first.keys():
        raise RecipeError(
            Problem("makes no samples of tokens, which is what can be shown", place="data.type")
        )


def _indices(wanted: tuple[int, ...], samples: SampleSet) -> list[int]:
    for index in wanted:
        if index >= len(samples):
            raise RecipeError(
                Problem(f"is {index}, but the set has {len(samples):,} samples, counted from 0",
                        place="--index")
            )  # fmt: skip
    return list(wanted)


def _check_folder(page: Path | None) -> None:
    """Say before anything is prepared that the page cannot be written."""
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        reason = "is a folder" if page.is_dir() else "there is no such folder"
        raise click.UsageError(f"--html {page} cannot be written: {reason}")
