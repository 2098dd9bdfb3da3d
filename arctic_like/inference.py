"""A trained model for use: from an export, a run directory, or a checkpoint to resume from.

runs/x/                 the newest of its exports and checkpoints (an export if both are as new)
runs/x/checkpoints/step-12      the weights of a `deepspeed` checkpoint, whatever its ZeRO stage
runs/x/exports/step-12, any other Hugging Face folder, of an adapter too: on its base
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arctic_like.checkpoint.huggingface import is_export
from arctic_like.checkpoint.layout import ENGINE, RUN_STATE, complete_checkpoints, marker, step_of
from arctic_like.checkpoint.reading import read_weights
from arctic_like.checkpoint.retention import best_of, recorded
from arctic_like.errors import CheckpointError, Problem, RecipeError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.recipe import Recipe

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Found:
    """Where weights lie: a Hugging Face folder, or a checkpoint `step-N` and the recipe's file."""

    folder: Path
    recipe: Path | None = None

    @property
    def is_export(self) -> bool:
        """Whether plain transformers can load it."""
        return self.recipe is None

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter without its base."""
        return self.is_export and (self.folder / "adapter_config.json").is_file()


def load_for_inference(
    path: str | Path, *, device: str = "cpu", step: int | Literal["best"] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in eval mode with its cache on, and its tokenizer.

    path: a Hugging Face folder, a run directory, or a checkpoint in it; step: which one of a run
    directory's. The weights keep the dtype that they were trained in. Raises RecipeError where
    there is nothing to load, CheckpointError where it cannot be read.
    """
    found = find(Path(path), step=step)
    model, tokenizer = _from_export(found.folder) if found.is_export else _from_checkpoint(found)
    model.config.use_cache = True
    return model.to(device).eval(), tokenizer


def find(path: Path, *, step: int | Literal["best"] | None = None) -> Found:
    """What to load for `path`, see above. Reads names and small files only. Raises RecipeError."""
    if not path.is_dir():
        raise _nothing(path, "there is no such folder")
    if is_export(path):
        return Found(path)
    if step_of(path) is not None and (path / RUN_STATE).is_file():
        return Found(_complete(path), _recipe_of(path))
    if not (path / RECIPE).is_file():
        raise _nothing(path, "is neither a run directory nor a Hugging Face folder")
    return _in_run(path, step=step)


def _in_run(run: Path, *, step: int | Literal["best"] | None) -> Found:
    exports = {
        number: Found(folder)
        for folder in _children(run / "exports")
        if (number := step_of(folder)) is not None and is_export(folder)
    }
    checkpoints = {
        number: Found(folder, run / RECIPE)
        for folder in complete_checkpoints(run / "checkpoints")
        if (number := step_of(folder)) is not None
    }
    available = checkpoints | exports
    if step == "best":
        return available[_best(run, [found.folder for found in available.values()])]
    if step is not None and step not in available:
        steps = ", ".join(str(number) for number in sorted(available)) or "none"
        raise _nothing(
            run, f"has no export or checkpoint of step {step}", hint=f"it has steps: {steps}"
        )
    if not available:
        raise _nothing(run, "has no complete export or checkpoint yet")
    return available[max(available) if step is None else step]


def _best(run: Path, folders: list[Path]) -> int:
    """The step of the best weights, by the monitored metric that the newest of them records."""
    ordered = sorted(folders, key=lambda folder: step_of(folder) or 0)
    known = [found for folder in ordered if (found := recorded(folder)) is not None]
    best = best_of(ordered, known[-1]) if known else None
    if best is None:
        raise _nothing(
            run, "has no export or checkpoint that was evaluated at its step, so none is best",
            hint="give the number of a step",
        )  # fmt: skip
    return step_of(best) or 0


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _complete(folder: Path) -> Path:
    if marker(folder) is None:
        raise CheckpointError(f"{folder} is not complete: its save was interrupted")
    return folder


def _recipe_of(checkpoint: Path) -> Path:
    # The folder may have been given by a link or as `.`.
    for run in checkpoint.resolve().parents[:2]:
        if (run / RECIPE).is_file():
            return run / RECIPE
    raise CheckpointError(
        f"{checkpoint} has no {RECIPE} above it, which says what model it is of\n"
        "    put the run's recipe.yaml beside the folder that holds it"
    )


def _nothing(
    path: Path,
    message: str,
    hint: str = "give a run directory (runs/…), a checkpoint in it, or a Hugging Face folder",
) -> RecipeError:
    return RecipeError(Problem(message, file=str(path), hint=hint))


def _from_export(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if (folder / "adapter_config.json").is_file():
        from arctic_like.checkpoint.adapters import load_adapter

        return load_adapter(folder)
    from transformers import AutoTokenizer

    from arctic_like.model.adapters.tasks import auto_class, task_of

    try:
        architectures = json.loads((folder / "config.json").read_text()).get("architectures")
        model: PreTrainedModel = auto_class(task_of(architectures)).from_pretrained(
            folder, dtype="auto"
        )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise CheckpointError(f"{folder} cannot be loaded: {reason.strip()}") from error
    return model, tokenizer


def _from_checkpoint(found: Found) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from arctic_like.recipe import load_recipe
    from arctic_like.registry import build

    assert found.recipe is not None
    recipe: Recipe = load_recipe(found.recipe)
    config: Any = recipe.config
    name = getattr(config.model, "name_or_path", "") or None
    tokenizer = build(config.tokenizer, "tokenizer").build(model_name_or_path=name)
    model = build(config.model, "model").for_weights(tokenizer=tokenizer, seed=config.seed)
    _check_base(model, found.folder)
    weights = read_weights(found.folder)
    _fill(model, weights, folder=found.folder)
    return model, tokenizer


def _check_base(model: Any, folder: Path) -> None:
    """Raise CheckpointError where the frozen weights, which the checkpoint does not hold, are others now."""
    from arctic_like.engine.deepspeed import SHAPES
    from arctic_like.engine.frozen_base import is_rebuilt, same_base

    if is_rebuilt(model):
        facts = json.loads((folder / ENGINE / SHAPES).read_text())
        same_base(model, facts, folder)


def _fill(model: PreTrainedModel, weights: dict[str, Tensor], *, folder: Path) -> None:
    """Copy the weights in, rounded to the model's dtype; every parameter must be among them, of a model
    with an adapter every trained one."""
    from arctic_like.model.adapters.build import adapter_weights, is_adapted

    missing, unknown = model.load_state_dict(weights, strict=False)
    tied = getattr(model, "all_tied_weights_keys", {})
    parameters = dict(adapter_weights(model) if is_adapted(model) else model.named_parameters())
    missing = [name for name in missing if name in parameters and tied.get(name) not in weights]
    if missing or unknown:
        raise CheckpointError(
            f"{folder} does not belong to the model of its recipe: "
            f"{', '.join([*missing, *unknown][:4])}"
        )
