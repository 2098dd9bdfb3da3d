"""`huggingface`: weights, config and tokenizer that others load with `from_pretrained`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.checkpoint.base import CheckpointConfig, CheckpointEngine
from arctic_like.checkpoint.layout import RUN_STATE, step_of
from arctic_like.checkpoint.publish import (
    REPLACED,
    appear,
    aside,
    check_space,
    files_below,
    recover,
    sync,
)
from arctic_like.checkpoint.retention import MONITORED, Monitored
from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from arctic_like.engine.host import HostGroup
    from arctic_like.world import World


class HFCheckpointConfig(CheckpointConfig):
    """A Hugging Face folder, of an adapter peft's; a run cannot go on from it, other programs can."""

    type: str = "huggingface"


class HFCheckpoint(CheckpointEngine):
    """Writes the model as a Hugging Face folder, whole or not at all."""

    name = "huggingface"
    config_type = HFCheckpointConfig
    folder = "exports"

    def save(
        self,
        *,
        module: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        world: World,
        host: HostGroup,
        monitored: Monitored | None = None,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Write `directory` (a `step-N`); then let go of those that need not stay. Collective.

        monitored: what these weights measured; `run.json` in the folder says so. Raises
        CheckpointError on every rank if it cannot be written; nothing of it is visible then.
        """
        self.write(
            module, tokenizer, directory=directory, host=host, monitored=monitored,
            steps_per_epoch=steps_per_epoch, total_steps=total_steps,
        )  # fmt: skip

    def write(
        self, module: nn.Module, tokenizer: PreTrainedTokenizerBase, *, directory: Path,
        host: HostGroup, monitored: Monitored | None, steps_per_epoch: int | None,
        total_steps: int | None, add: Callable[[Path], None] | None = None,
    ) -> None:  # fmt: skip
        """`save`, with files that `add` writes into the folder on rank zero before it has its name."""
        metric = monitored or Monitored()
        if host.world.is_main:
            recover(directory.parent, marked=False)
        facts = {"step": step_of(directory), MONITORED: metric.as_dict()}
        export(module, tokenizer, directory=directory, host=host, facts=facts, add=add)
        if host.world.is_main:
            self.let_go(
                exports_in(directory.parent), metric,
                steps_per_epoch=steps_per_epoch, total_steps=total_steps,
            )  # fmt: skip


def export(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    directory: Path,
    host: HostGroup,
    dtype: torch.dtype | None = None,
    facts: Mapping[str, Any] | None = None,
    add: Callable[[Path], None] | None = None,
) -> None:
    """Write a transformers model as `directory`: aside first, synced, then renamed. Collective.

    Of a model with an adapter, the adapter alone.

    dtype: of the floating weights in the files; None keeps the trained one. facts: plain values of the
    run, for `run.json` beside them. add: writes more files into the folder, on rank zero. A folder of
    that name is replaced once the new one is complete. Raises CheckpointError.
    """
    from arctic_like.checkpoint import adapters
    from arctic_like.checkpoint.safetensors import write_weights
    from arctic_like.engine.weights import weight_bytes
    from arctic_like.model.adapters.build import is_adapted

    main, adapted = host.world.is_main, is_adapted(module)
    partial = aside(directory)
    error: BaseException | None = None
    if main:
        needed = adapters.adapter_bytes(module) if adapted else weight_bytes(module)
        error = _prepare(module, directory, partial, needed=needed)
    host.raise_together(error)
    write = adapters.write_adapter if adapted else write_weights
    error = write(module, partial if main else None, dtype=dtype)
    if main and error is None:
        try:
            if adapted:
                adapters.write_description(module, tokenizer, partial)
            else:
                _write_description(module, tokenizer, partial, dtype=dtype)
            if facts is not None:
                (partial / RUN_STATE).write_text(json.dumps(facts, indent=1) + "\n")
            if add is not None:
                add(partial)
            _publish(directory)
        except (OSError, ValueError, RuntimeError) as problem:
            error = _not_written(directory, problem)
    elif error is not None:
        error = _not_written(directory, error)
    if main and error is not None:
        shutil.rmtree(partial, ignore_errors=True)
    host.raise_together(error)
    host.barrier()


def exports_in(folder: Path) -> list[Path]:
    """The complete exports of a folder, oldest first by step *number*."""
    found = [
        (step, path)
        for path in folder.iterdir()
        if (step := step_of(path)) is not None and is_export(path)
    ]
    return [path for _, path in sorted(found)]


def is_export(folder: Path) -> bool:
    """Whether a folder holds a model, or an adapter, for other programs."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _prepare(
    module: nn.Module, directory: Path, partial: Path, *, needed: int
) -> BaseException | None:
    from transformers import PreTrainedModel

    from arctic_like.model.adapters.build import is_adapted

    if not isinstance(module, PreTrainedModel) and not is_adapted(module):
        return CheckpointError(
            "the huggingface checkpoint engine writes transformers models, "
            f"not {type(module).__name__}"
            "\n    remove it from the recipe's checkpoint: list"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        replaced = directory.with_name(directory.name + REPLACED)
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)  # killed between the two renames of `_publish`
        if refused := check_space(directory.parent, needed):
            return CheckpointError(refused)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as problem:
        return _not_written(directory, problem)
    return None


def _write_description(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype | None,
) -> None:
    """Everything but the weights: configs, tokenizer with chat template, the model's code."""
    import copy

    from transformers.dynamic_module_utils import custom_object_save

    config = copy.deepcopy(model.config)
    config.use_cache = True  # off in training only
    config.dtype = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if getattr(model, "_auto_class", None) is not None:
        custom_object_save(model, str(folder), config=config)
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _publish(folder: Path) -> None:
    """Give what was written aside its name, once it is on the disk."""
    written = aside(folder)
    for name in files_below(written):
        sync(written / name)
    appear(folder)


def _not_written(directory: Path, problem: BaseException) -> CheckpointError:
    return CheckpointError(f"the export {directory} could not be written: {problem}")
