"""`arctic-train generate MODEL --input prompts.jsonl --output answers.jsonl`: a file of prompts answered."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arctic_like.cli.answering import Generator, batches
from arctic_like.cli.answers_file import AnswersFile
from arctic_like.cli.export import Step, check_step
from arctic_like.cli.prompt_rows import PromptRow, read_rows
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@click.command(name="generate", context_settings={"max_content_width": 80})
@click.argument("source", metavar="RECIPE|RUN_DIR|MODEL", type=click.Path(path_type=Path))
@click.option("--input", "prompts", required=True, type=click.Path(path_type=Path),
              help="Prompts: .jsonl, or a text file with one a line.")  # fmt: skip
@click.option("--output", "target", required=True, type=click.Path(path_type=Path),
              help="The file of answers (.jsonl).")  # fmt: skip
@click.option("--step", help="Which step of a run, or `best`; the newest by default.")
@click.option("--adapter", type=click.Path(path_type=Path), help="An adapter to put on MODEL.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True,
              help="Prompts answered at once.")  # fmt: skip
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True,
              help="Longest answer in tokens.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="0 always takes the likeliest token; more draws at random.")  # fmt: skip
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0,
              show_default=True,
              help="Draw from the likeliest tokens of this probability.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the draws.")  # fmt: skip
@click.option(
    "--raw", is_flag=True, help="Continue prompts as they are, without the chat template."
)
@click.option("--answer-key", default="answer", show_default=True, help="Where an answer goes.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto",
              show_default=True, help="Where the model runs.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the output where there is one.")
def command(
    source: Path, *, prompts: Path, target: Path, step: str | None, adapter: Path | None,
    batch_size: int, max_new_tokens: int, temperature: float, top_p: float, seed: int, raw: bool,
    answer_key: str, device: str, overwrite: bool,
) -> int:  # fmt: skip
    """Answer every prompt of a file.

    A row of the input is {"prompt": …} or {"messages": […]} with any other keys, or a
    line of plain text. The output has the same rows in the same order, with the answer.
    An answer does not depend, but for rounding, on the batch it was made in. An
    interrupted command, repeated, goes on where it stopped.
    """
    rows = read_rows(prompts, answer_key=answer_key)
    if target.exists() and not overwrite:
        raise RecipeError(
            Problem("is there already", file=str(target), hint="name another, or add --overwrite")
        )
    place = weights_of(source, step=check_step(step), adapter=adapter)
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed} if temperature else {}
    about = {
        "input": fingerprint(rows), "model": place, "adapter": str(adapter or ""),
        "max_new_tokens": max_new_tokens, "raw": raw, "sampling": sampling,
    }  # fmt: skip
    answers = AnswersFile(target, about=about)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    answers.open()
    try:
        model, tokenizer, on = load(place, adapter=adapter, device=device)
        generator = Generator(
            model, tokenizer, device=on, max_new_tokens=max_new_tokens, raw=raw, sampling=sampling,
        )  # fmt: skip
        encoded = generator.encode(rows, file=prompts)
        _answer_all(generator, encoded, answers, batch_size=batch_size)
    except KeyboardInterrupt:
        click.echo(
            f"\n{len(answers.answers)} of {len(rows)} answers are in {answers.journal}; "
            "the same command goes on from there",
            err=True,
        )
        raise
    finally:
        answers.close()
    answers.finish(rows, key=answer_key)
    click.echo(f"wrote {len(rows)} answers to {target}")
    return 0


def weights_of(source: Path, *, step: Step, adapter: Path | None) -> str:
    """The folder of weights for a recipe, a run directory or a model's folder. Raises RecipeError.

    With an adapter: its base, which may be a name on the Hub.
    """
    from arctic_like.inference import find

    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise RecipeError(
                Problem(
                    "has no adapter_config.json, so it is no adapter",
                    file=str(adapter), place="--adapter",
                    hint="give a folder that peft or an export has written",
                )
            )  # fmt: skip
        return str(source.resolve()) if source.is_dir() else str(source)
    return str(find(run_of(source), step=step).folder.resolve())


def run_of(source: Path) -> Path:
    """The run directory of a recipe; any other path as it is. Raises RecipeError."""
    if not source.is_file():
        return source
    from arctic_like.cli.startup import without_pydantic_plugins

    with without_pydantic_plugins():
        from arctic_like.recipe import load_recipe

        stated = load_recipe(source).config.output_dir
    if stated is None:
        raise RecipeError(
            Problem("is not stated, so the recipe does not say which run is meant",
                    place="output_dir", file=str(source),
                    hint="give the run's directory (runs/…) in place of the recipe")
        )  # fmt: skip
    return Path(stated)


def load(
    place: str, *, adapter: Path | None, device: str
) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """Model in eval mode, tokenizer, torch device; what loading prints goes to standard error."""
    from arctic_like.cli import chat

    if adapter is None:
        return chat.load(Path(place), device=device)
    from arctic_like.checkpoint.adapters import load_adapter

    with contextlib.redirect_stdout(sys.stderr):
        on = chat.device_for(device)
        chat.be_quiet()
        model, tokenizer = load_adapter(adapter, base=place)
        chat.check_writes(model, adapter)
    model.config.use_cache = True
    return model.to(on).eval(), tokenizer, on


def fingerprint(rows: Sequence[PromptRow]) -> str:
    """Of all rows' contents and their order."""
    import json

    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps([row.content for row in rows]).encode())


def _answer_all(
    generator: Generator, prompts: Sequence[list[int]], answers: AnswersFile, *, batch_size: int
) -> None:
    left = [number for number in range(len(prompts)) if number not in answers.answers]
    with click.progressbar(
        length=len(prompts), label="answers", file=sys.stderr, show_pos=True
    ) as bar:
        bar.update(len(prompts) - len(left))
        for batch in batches(
            {number: (generator.room(prompts[number]), len(prompts[number])) for number in left},
            batch_size=batch_size,
        ):
            answers.add(generator.answer({number: prompts[number] for number in batch}))
            bar.update(len(batch))
