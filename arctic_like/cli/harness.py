"""`arctic-train evaluate MODEL --harness TASKS`: lm-evaluation-harness on a run's model or an export.

The model is loaded as `chat` and `generate` load it and handed to the harness as it is, so a checkpoint or an
adapter needs no export first. What the harness is told stands in `ARGUMENTS`; the names are its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from arctic_like.errors import Problem, RecipeError, RunError

ARGUMENTS: dict[str, tuple[type, ...]] = {
    "num_fewshot": (int,), "limit": (int, float), "batch_size": (int, str), "max_length": (int,),
    "apply_chat_template": (bool,), "system_instruction": (str,), "fewshot_as_multiturn": (bool,),
    "gen_kwargs": (str, dict), "include_path": (str,), "bootstrap_iters": (int,),
    "confirm_run_unsafe_code": (bool,), "device": (str,),
}  # fmt: skip
"""What may be said beside the tasks, as `key=value`, with the types of values. `batch_size` and `max_length`
are the harness's model's, `include_path` is a folder of tasks, `device` is auto, cpu or cuda."""
FILE = "harness.json"


@dataclass(frozen=True)
class Request:
    """What the harness is asked. tasks: names of tasks, groups or tags, or patterns of them."""

    tasks: list[str]
    arguments: dict[str, Any]


def read_request(tasks: str, words: Sequence[str]) -> Request:
    """From `arc_easy,hellaswag` and words like `limit=100`. Raises RecipeError, UsageError."""
    import yaml

    names = [name for name in tasks.split(",") if name]
    if not names:
        raise click.UsageError("--harness needs tasks: --harness arc_easy,hellaswag")
    arguments: dict[str, Any] = {}
    problems: list[Problem] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in ARGUMENTS:
            near = difflib.get_close_matches(key, ARGUMENTS, n=1)
            problems.append(
                Problem("is nothing that the harness is told", word, f"did you mean {near[0]}=…?" if near
                        else f"there are {', '.join(ARGUMENTS)}")
            )  # fmt: skip
            continue
        found = yaml.safe_load(value)
        kinds = ARGUMENTS[key]
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            problems.append(Problem(f"is {found!r}; expected is {wanted}", key))
        arguments[key] = found
    if problems:
        raise RecipeError(problems)
    return Request(names, arguments)


def measure(
    source: Path, request: Request, *, step: str | None, target: Path | None, argv: Sequence[str]
) -> int:
    """Run the tasks, print a table, write `harness.json`; returns the exit code.

    source: a run directory, a recipe that states its `output_dir`, or a model's folder. target: the
    file; in the run directory, or here, unless given.
    """
    from arctic_like.checkpoint.layout import step_of
    from arctic_like.cli import generate
    from arctic_like.cli.evaluate import write
    from arctic_like.cli.export import check_step

    harness, kind = import_harness()
    arguments = dict(request.arguments)
    manager = harness.tasks.TaskManager(include_path=arguments.pop("include_path", None))
    tasks = known_tasks(request.tasks, manager)
    place = generate.weights_of(source, step=check_step(step), adapter=None)
    model, tokenizer, device = generate.load(
        place, adapter=None, device=arguments.pop("device", "auto")
    )
    own = {key: arguments.pop(key) for key in ("batch_size", "max_length") if key in arguments}
    try:
        wrapped = kind(pretrained=model, tokenizer=tokenizer, **own)
        found = harness.simple_evaluate(
            model=wrapped, tasks=tasks, task_manager=manager, log_samples=False, **arguments
        )
    except Exception as error:
        raise RunError(
            f"lm-evaluation-harness ended with {type(error).__name__}: {error}\n"
            "    tasks are read from the Hub; see its documentation, or name your own by include_path"
        ) from error
    run = generate.run_of(source)
    folder = run if (run / "recipe.yaml").is_file() else Path()
    target = target or folder / FILE
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "weights": place, "step": step_of(Path(place)), "device": device, "tasks": request.tasks,
        "arguments": request.arguments, "command": list(argv),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"lm_eval": _version("lm_eval"), "tasks": found.get("versions", {})},
        "num_fewshot": found.get("n-shot", {}), "results": found["results"],
    }  # fmt: skip
    write(target, facts)
    show(found["results"], weights=place, target=target)
    return 0


def import_harness() -> tuple[Any, Any]:
    """(the package, its class of models of transformers). Raises RecipeError where it is not installed."""
    try:
        import lm_eval  # type: ignore[import-not-found]
        import lm_eval.tasks  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]
    except ImportError as error:
        raise RecipeError(
            Problem(f"needs lm-evaluation-harness, which cannot be imported ({error})", "--harness",
                    "pip install 'arctic-like[harness]'")
        ) from error  # fmt: skip
    return lm_eval, HFLM


def known_tasks(names: Sequence[str], manager: Any) -> list[str]:
    """The tasks, groups and tags that the names and patterns mean. Raises RecipeError for what means none."""
    found: list[str] = []
    problems = []
    for name in names:
        mine = manager.match_tasks([name])
        if not mine:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists them"
            problems.append(Problem(f"has no task {name!r}", "--harness", hint))
        found += [one for one in mine if one not in found]
    if problems:
        raise RecipeError(problems)
    return found


def show(results: Mapping[str, Mapping[str, Any]], *, weights: str, target: Path) -> None:
    """The table: a row for each number of each task, with its standard error."""
    from rich.table import Table

    from arctic_like.logs import console

    table = Table("task", "metric", "value", "± stderr", box=None, header_style="bold",
                  padding=(0, 3, 0, 0))  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for task, values in results.items():
        for name, value in values.items():
            metric, _, chosen = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            shown = f"{error:.4f}" if isinstance(error, float) else ""
            label = metric if chosen in ("", "none") else f"{metric} ({chosen})"
            table.add_row(task, label, f"{value:.4f}", shown)
    console().print()
    console().print(table)
    console().print()
    console().print(f"weights  {weights}\nwrote    {target}", markup=False, soft_wrap=True)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
