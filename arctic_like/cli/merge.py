"""`arctic-train merge ADAPTER OUT`: write base and adapter as one model."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from arctic_like.errors import Problem, RecipeError


@click.command(name="merge", context_settings={"max_content_width": 80})
@click.argument("adapter", metavar="ADAPTER|RUN_DIR", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--into", "base", help="The base, where it is not the one that the adapter names.")
@click.option("--dtype", help="bf16, fp16 or fp32; the base's by default.")
def command(adapter: Path, target: Path, base: str | None, dtype: str | None) -> int:
    """Merge an adapter into its base and write a Hugging Face folder.

    ADAPTER is a folder with an adapter_config.json, or a run that trained one. The base
    must be the one it was trained on. The merged model's logits are compared with those
    of base and adapter before OUT, which must not exist, appears.
    """
    from arctic_like.cli.export import check_dtype, check_target

    name = check_dtype(dtype)
    check_target(target)
    with contextlib.redirect_stdout(sys.stderr):
        moved = write(adapter, target, base=base, dtype=name)
    click.echo(f"wrote {target} (logits moved by {moved:.1g} of the largest)")
    return 0


def write(source: Path, target: Path, *, base: str | None, dtype: str | None) -> float:
    """Load, merge, prove and write; how far logits moved. Raises RecipeError and RunError."""
    from arctic_like.inference import find

    found = find(source)  # before the seconds that importing torch takes
    if base is not None and not found.is_adapter:
        raise RecipeError(
            Problem("is for an adapter's folder; a run's checkpoint has its recipe's base", "--into",
                    "leave it out, or `arctic-train export` the run first")
        )  # fmt: skip
    import torch
    from transformers.utils import logging

    from arctic_like.checkpoint.adapters import load_adapter
    from arctic_like.checkpoint.huggingface import export
    from arctic_like.checkpoint.merge import merge
    from arctic_like.engine.host import HostGroup
    from arctic_like.inference import load_for_inference
    from arctic_like.model.adapters.build import is_adapted
    from arctic_like.world import World

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if base is not None:
        model, tokenizer = load_adapter(found.folder, base=base)
    else:
        model, tokenizer = load_for_inference(source)
    if not is_adapted(model):
        raise RecipeError(
            Problem("has no adapter to merge", file=str(source),
                    hint="it is a whole model: `arctic-train export` writes it")
        )  # fmt: skip
    own = model.get_base_model().dtype
    merged, moved = merge(model)
    export(
        merged, tokenizer, directory=target.absolute(), host=HostGroup(World()),
        dtype=getattr(torch, dtype) if dtype else own,
    )  # fmt: skip
    return moved
