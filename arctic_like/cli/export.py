"""`arctic-train export RUN_DIR OUT`: write a run's model as a folder that other programs load."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Literal

import click

from arctic_like.errors import Problem, RecipeError

Step = int | Literal["best"] | None


@click.command(name="export", context_settings={"max_content_width": 80})
@click.argument("source", metavar="RUN_DIR|CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--step", help="Which step of a run, or `best`; the newest by default.")
@click.option("--dtype", help="bf16, fp16 or fp32; as trained by default.")
def command(source: Path, target: Path, step: str | None, dtype: str | None) -> int:
    """Write the model of a run, or of one of its checkpoints, as a Hugging Face folder.

    OUT gets weights (safetensors), config, tokenizer with its chat template and
    generation config; it must not exist, or be empty.
    """
    name, chosen = check_dtype(dtype), check_step(step)
    check_target(target)
    with contextlib.redirect_stdout(sys.stderr):
        write(source, target, step=chosen, dtype=name)
    click.echo(f"wrote {target}")
    return 0


def check_dtype(dtype: str | None) -> str | None:
    """The attribute of torch for a dtype as people write it. Raises RecipeError."""
    if dtype is None:
        return None
    from pydantic_core import PydanticCustomError

    from arctic_like.config.values import TORCH_DTYPES, to_dtype

    try:
        return TORCH_DTYPES[to_dtype(dtype)]
    except PydanticCustomError as error:
        raise RecipeError(
            Problem(error.message(), place="--dtype", hint="write bf16, fp16 or fp32")
        ) from None


def check_step(step: str | None) -> Step:
    """A step's number, or "best". Raises RecipeError for other words."""
    if step is None or step == "best":
        return "best" if step else None
    if not step.isdigit():
        raise RecipeError(
            Problem(f"is {step!r}, not a step's number", place="--step", hint="write 12 or best")
        )
    return int(step)


def check_target(target: Path) -> None:
    """Raise RecipeError if something is there already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise RecipeError(Problem(what, file=str(target), hint="name a folder that does not exist"))


def write(source: Path, target: Path, *, step: Step, dtype: str | None) -> None:
    """Load and export. Raises RecipeError and CheckpointError."""
    from arctic_like.inference import find

    find(source, step=step)  # before the seconds that importing torch takes
    import torch
    from transformers.utils import logging

    from arctic_like.checkpoint.huggingface import export
    from arctic_like.engine.host import HostGroup
    from arctic_like.inference import load_for_inference
    from arctic_like.world import World

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load_for_inference(source, step=step)
    export(
        model,
        tokenizer,
        directory=target.absolute(),
        host=HostGroup(World()),
        dtype=getattr(torch, dtype) if dtype else None,
    )
