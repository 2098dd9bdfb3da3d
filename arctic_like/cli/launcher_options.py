"""The `deepspeed` launcher's options: checked before anything starts, then passed on unchanged.

A test compares the table with the installed DeepSpeed (`deepspeed/launcher/runner.py::parse_args`).
"""

from __future__ import annotations

import argparse
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from arctic_like.errors import Problem, RecipeError

VALUED = {
    "--hostfile": "-H", "--include": "-i", "--exclude": "-e", "--num_nodes": "", "--num_gpus": "",
    "--num_accelerators": "", "--master_port": "", "--master_addr": "", "--node_rank": "",
    "--launcher": "", "--launcher_args": "", "--enable_each_rank_log": "", "--bind_core_list": "",
    "--ssh_port": "", "--venv_script": "", "--log_level": "", "--autotuning": "",
}  # fmt: skip
FLAGS = {
    "--module": "", "--no_python": "", "--no_local_rank": "", "--no_ssh": "", "--no_ssh_check": "",
    "--force_multi": "", "--save_pid": "", "--bind_cores_to_rank": "", "--quiet": "-q",
}  # fmt: skip
REFUSED = {
    "no_python": "the launcher starts Python for us; leave it out",
    "autotuning": "DeepSpeed's autotuner cannot drive a recipe; leave it out",
}
_WHOLE = {"--num_nodes", "--num_gpus", "--num_accelerators", "--master_port", "--node_rank"}
DEFAULT_HOSTFILE = "/job/hostfile"


@dataclass(frozen=True)
class LauncherOptions:
    """What the command must know of the options that it passes on."""

    given: tuple[str, ...]
    """All of them, as typed."""
    processes: int | None
    """`--num_gpus`: processes on each node; None if it is not stated."""
    chooses_devices: bool
    """Some option says how many processes start, or where."""
    multi_node: bool
    """Processes may start on other machines."""
    port: bool
    quiet: bool
    """The launcher's own talking is set by the user."""
    binds_cores: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(
            Problem(
                message,
                place="launcher options",
                hint="`deepspeed --help` lists them; key=value overrides stand before the first "
                "--option",
            )
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False)
    for name, short in VALUED.items():
        names = [short, name] if short else [name]
        parser.add_argument(*names, type=int if name in _WHOLE else str)
    for name, short in FLAGS.items():
        parser.add_argument(*([short, name] if short else [name]), action="store_true")
    return parser


def parse_launcher_options(options: list[str]) -> LauncherOptions:
    """Read the options as the launcher will. Raises RecipeError for what it would not take."""
    known, rest = _parser().parse_known_args(options)
    if rest:
        raise RecipeError([_explain(word) for word in rest])
    refused = [f"--{name}" for name in REFUSED if getattr(known, name)]
    if refused:
        raise RecipeError(
            [Problem("cannot be used here", place=o, hint=REFUSED[o[2:]]) for o in refused]
        )
    processes = known.num_gpus if known.num_gpus is not None else known.num_accelerators
    if processes is not None and processes < 1:
        raise RecipeError(
            Problem(
                f"is {processes}, not a number of processes",
                place="--num_gpus",
                hint="give 1 or more",
            )
        )
    hostfile = known.hostfile or DEFAULT_HOSTFILE
    return LauncherOptions(
        given=tuple(options),
        processes=processes,
        chooses_devices=any((processes, known.include, known.exclude, known.num_nodes)),
        multi_node=known.force_multi or known.no_ssh or Path(hostfile).is_file(),
        port=known.master_port is not None,
        quiet=known.log_level is not None or known.quiet,
        binds_cores=known.bind_cores_to_rank,
    )


def _explain(word: str) -> Problem:
    if not word.startswith("-"):
        message = "stands after a launcher option"
        way_out = (
            f"put {word!r} before the first --option" if "=" in word else f"leave {word!r} out"
        )
        return Problem(message, place=word, hint=way_out)
    name = word.partition("=")[0]
    near = difflib.get_close_matches(name, [*VALUED, *FLAGS], 1)
    hint = f"did you mean {near[0]}?" if near else "`deepspeed --help` lists them"
    return Problem("is no option of the deepspeed launcher", place=name, hint=hint)
