"""`arctic-train`: the verbs, and the recipe that needs none.

Each verb lives in a module of its own, imported when it is called, so that `--help` imports none
of them.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from arctic_like.errors import INTERRUPTED, WRONG, ArcticError

VERBS = {
    "resume": ("arctic_like.cli.train:resume", "Go on with the run in a directory."),
    "validate": ("arctic_like.cli.validate:command", "Check a recipe without running it."),
    "plan": ("arctic_like.cli.plan:command", "Say what a run will take, before the run."),
    "preprocess": ("arctic_like.cli.preprocess:command", "Prepare a recipe's data before a run."),
    "inspect": ("arctic_like.cli.inspect:command", "Show samples as the model will see them."),
    "cache": ("arctic_like.cli.cache:command", "List and remove prepared data."),
    "init": ("arctic_like.cli.init:command", "Print a commented recipe to start from."),
    "list": ("arctic_like.cli.listing:command", "List what a recipe can name by `type:`."),
    "schema": ("arctic_like.cli.schema:command", "Print the JSON Schema of recipes, for editors."),
    "export": ("arctic_like.cli.export:command", "Write a run's model for other programs to load."),
    "merge": ("arctic_like.cli.merge:command", "Merge an adapter into its base."),
    "chat": ("arctic_like.cli.chat:command", "Talk to a run's model."),
    "generate": ("arctic_like.cli.generate:command", "Answer a file of prompts."),
    "evaluate": ("arctic_like.cli.evaluate:command", "Measure a model on a recipe's data."),
    "profile": ("arctic_like.cli.profile:command", "Say where the time of a recipe's steps goes."),
}
"""Verb → where its click command is, and its line in the help."""

HELP = """Train what a recipe describes.

\b
  arctic-train RECIPE [key=value …] [any option of the deepspeed launcher]
  arctic-train recipes/quickstart.yaml train_iters=50 --num_gpus 2

A first word that is no verb is a recipe. Overrides (key=value, the value is YAML)
stand before the first --option; from there on all goes to deepspeed.

\b
Exit codes: 0 done, 2 the recipe or the command is wrong, 1 the run failed,
130 interrupted, 143 terminated.
"""


class Verbs(click.Group):
    """Verbs by name, anything else as a recipe to train."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, attribute = VERBS[cmd_name][0].partition(":")
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in VERBS:
            return super().resolve_command(ctx, args)
        from arctic_like.cli.train import train

        return None, train, args


@click.group(
    cls=Verbs,
    help=HELP,
    no_args_is_help=True,
    options_metavar="",
    subcommand_metavar="RECIPE | VERB …",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False,
              callback=lambda ctx, param, wanted: _version(ctx) if wanted else None,
              help="Print the version.")  # fmt: skip
def command() -> None:
    """The group that holds all verbs."""


def _version(ctx: click.Context) -> None:
    from importlib.metadata import version

    click.echo(f"arctic-train {version('arctic-like')}")
    ctx.exit(0)


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code. Expected errors are sentences on stderr."""
    try:
        result: Any = command.main(
            args=sys.argv[1:] if argv is None else list(argv),
            prog_name="arctic-train",
            standalone_mode=False,
        )
    except click.ClickException as error:
        error.show()
        return WRONG
    except click.Abort:
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except ArcticError as error:
        from arctic_like.cli.show import show_error

        show_error(error)
        return error.exit_code
    except BrokenPipeError:
        # the reader (`| head`) has gone; Python would complain once more when it flushes at its end
        sys.stdout = None
        return 0
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
