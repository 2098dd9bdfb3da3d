"""`arctic-train RECIPE …` and `arctic-train resume RUN_DIR …`: everything before the launch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arctic_like.cli.startup import without_pydantic_plugins
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.recipe import Recipe


class Words(click.Command):
    """A command whose words reach it untouched, in their order: options in them are deepspeed's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep all words; only a help option by itself is ours."""
        if any(word in ("-h", "--help") for word in args):
            # training has no verb: its help is the command's
            click.echo((ctx.find_root() if self.name == "train" else ctx).get_help())
            ctx.exit(0)
        ctx.params = {"words": list(args)}
        return []


@dataclass(frozen=True)
class CommandLine:
    """Words in their three groups."""

    target: str
    """The recipe, or the run directory."""
    overrides: list[str]
    launcher_options: list[str]


def split_words(words: list[str]) -> CommandLine:
    """Recipe, overrides up to the first `--option`, launcher options.

    Raises RecipeError for an override among the launcher options, and for options nobody knows.
    """
    from arctic_like.cli.launcher_options import parse_launcher_options

    target, *rest = words
    first = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    options = rest[first:]
    if options:
        parse_launcher_options(options)
    return CommandLine(target, rest[:first], options)


@click.command(cls=Words, name="train")
def train(words: list[str]) -> int:
    """Train what a recipe describes."""
    if words[0].startswith("-"):
        raise click.UsageError(f"{words[0]} stands before the recipe; launcher options stand last")
    _refuse_misspelt_verb(words[0])
    line = split_words(words)
    from arctic_like.api import default_output_dir
    from arctic_like.rundir import RunDirectory

    recipe = read_recipe(line.target, line.overrides)
    check_before_launch(recipe)
    output_dir = default_output_dir(recipe)
    resumes = recipe.config.auto_resume and not recipe.config.overwrite
    RunDirectory(output_dir).check(resume=resumes, overwrite=recipe.config.overwrite)
    return _launch(recipe, line, output_dir, resume="auto" if resumes else "", words=words)


@click.command(
    cls=Words,
    name="resume",
    options_metavar="RUN_DIR [key=value …] [--step N] [launcher options]",
    context_settings={"max_content_width": 80},
)
def resume(words: list[str]) -> int:
    """Go on with the run in a directory, from its newest complete checkpoint.

    --step N goes on from another one, --step best from the best. Overrides change the
    saved recipe; what would make the result meaningless is refused.
    """
    spoken = ["resume", *words]
    if not words or words[0].startswith("-"):
        raise click.UsageError("name a run directory: arctic-train resume RUN_DIR [--step N|best]")
    words, step = _take_step(words)
    line = split_words(words)
    folder = Path(line.target)
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(_no_run(folder))
    recipe = read_recipe(folder / "recipe.yaml", line.overrides)
    check_before_launch(recipe)
    chosen = "latest" if step is None else step if step == "best" else f"step-{step}"
    return _launch(recipe, line, folder, resume=chosen, words=spoken)


def read_recipe(path: str | Path, overrides: list[str]) -> Recipe:
    """The recipe, without what pydantic's plugins would cost at every start. Raises RecipeError."""
    with without_pydantic_plugins():
        from arctic_like.recipe import load_recipe

        return load_recipe(path, overrides)


def _launch(
    recipe: Recipe, line: CommandLine, output_dir: Path, *, resume: str, words: list[str]
) -> int:
    from arctic_like.cli.launch import launch

    return launch(
        recipe,
        overrides=line.overrides,
        launcher_options=line.launcher_options,
        output_dir=output_dir,
        resume=resume,
        argv=["arctic-train", *words],
    )


def check_before_launch(recipe: Recipe) -> None:
    """Warn of what has no effect, refuse what this version cannot carry out."""
    from arctic_like.api import refuse_what_cannot_run
    from arctic_like.cli.devices import visible_gpus
    from arctic_like.cli.show import show_problems
    from arctic_like.recipe import warnings

    show_problems(warnings(recipe.config), kind="warning")
    on_cpu = recipe.config.device == "cpu" or not visible_gpus()
    refuse_what_cannot_run(recipe, on_cpu=on_cpu)


def _take_step(words: list[str]) -> tuple[list[str], str | None]:
    """`--step N`, `--step=N` or `--step best`, wherever it stands; the rest is overrides and deepspeed's."""
    rest: list[str] = []
    step: str | None = None
    left = iter(words)
    for word in left:
        if word == "--step":
            step = next(left, "")
        elif word.startswith("--step="):
            step = word.removeprefix("--step=")
        else:
            rest.append(word)
    if step is not None and not step.isdigit() and step != "best":
        raise click.UsageError(f"--step takes the number of a saved step, or best, not {step!r}")
    return rest, str(int(step)) if step and step.isdigit() else step


def _no_run(folder: Path) -> Problem:
    if not folder.exists():
        return Problem(
            "there is no such run directory", file=str(folder), hint=_runs_beside(folder)
        )
    return Problem(
        "holds no run: there is no recipe.yaml in it", file=str(folder), hint=_runs_beside(folder)
    )


def _runs_beside(folder: Path) -> str:
    """The run directories that may have been meant: the newest in or beside the named folder."""
    for parent in (folder, folder.parent, Path("runs")):
        if parent.is_dir():
            runs = [path.parent for path in parent.glob("*/recipe.yaml")]
            if runs:
                newest = max(runs, key=lambda run: run.stat().st_mtime)
                return f"did you mean {newest}?"
    return ""


def _refuse_misspelt_verb(word: str) -> None:
    """A word that is like a verb and unlike a file is a misspelt verb."""
    if "/" in word or "." in word or Path(word).exists():
        return
    from arctic_like.cli.main import VERBS
    from arctic_like.registry import nearest

    files = [name for suffix in (".yaml", ".yml") if Path(name := word + suffix).is_file()]
    near = files[0] if files else repr(nearest(word, VERBS))
    hint = f"verbs: {', '.join(VERBS)}" if near == "''" else f"did you mean {near}?"
    raise RecipeError(Problem(f"{word!r} is neither a verb nor a recipe's file", hint=hint))
