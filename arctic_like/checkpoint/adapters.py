"""Adapters as folders that peft and vLLM read: weights, config, tokenizer, and which base they are of.

adapter_model.safetensors   the weights, by peft's names
adapter_config.json         peft's config, with base_model_name_or_path
base_model.json             ours: the base's name, dtype and fingerprint
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.errors import CheckpointError, Problem, RecipeError
from arctic_like.model.adapters import fingerprint, tasks
from arctic_like.model.adapters.build import BASE, NAME, adapter_weights, from_folder
from arctic_like.model.adapters.convert import as_lora, config_as_lora, took_from_base
from arctic_like.model.embedding import without_pooler

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_bytes(module: nn.Module) -> int:
    """About how many bytes the adapter's file takes."""
    factor = 2 if took_from_base(module) else 1
    sizes = (int(getattr(p, "ds_numel", p.numel())) * p.element_size()
             for _, p in adapter_weights(module))  # fmt: skip
    return factor * sum(sizes)


def write_adapter(
    module: Any, folder: Path | None, *, dtype: torch.dtype | None = None
) -> BaseException | None:
    """Write the adapter's weights. Collective; `folder` is rank 0's, None elsewhere.

    Returns what went wrong in writing rather than raising it: other ranks are here too.
    """
    from arctic_like.model.initial import gathered

    own = dict(adapter_weights(module))
    with gathered(list(dict.fromkeys(own.values()))):
        if folder is None:
            return None
        try:
            from safetensors.torch import save_file

            whole = {name: parameter.detach().cpu().clone() for name, parameter in own.items()}
            state = _state(module, whole)
            if dtype is not None:
                state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
            save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        except (OSError, ValueError, RuntimeError) as problem:
            return problem
    return None


def write_description(module: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Everything but the weights: peft's config, the base's fingerprint, the tokenizer."""
    about = vars(module)[BASE]
    config = copy.deepcopy(module.peft_config[NAME])
    if took_from_base(module):
        config = config_as_lora(config)
    if targets := _short_targets(module):
        config.target_modules = targets
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = about["name_or_path"], about["revision"]
    config.save_pretrained(str(folder))
    # peft writes sets in an order of their own; equal adapters shall be equal files.
    known = {field.name for field in dataclasses.fields(config)}
    content = {k: v for k, v in json.loads((folder / CONFIG).read_text()).items() if k in known}
    for key in known:
        if isinstance(getattr(config, key), set):
            content[key] = sorted(getattr(config, key))
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (folder / fingerprint.FILE).write_text(json.dumps(about, indent=1) + "\n")
    tokenizer.save_pretrained(folder)


def load_adapter(folder: Path, *, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The base with the adapter on it, in the dtype it was trained in, on the CPU; and the tokenizer.

    base: Hub name or folder, in place of the one that the adapter's config names. Raises RecipeError for
    a base that the adapter does not belong to, CheckpointError where something cannot be read.
    """
    import torch
    from transformers import AutoTokenizer

    from arctic_like.config.values import TORCH_DTYPES

    try:
        config = json.loads((folder / CONFIG).read_text())
        about = fingerprint.read(folder) or {}
        name = base or config.get("base_model_name_or_path")
        if not name:
            raise RecipeError(
                Problem("does not say which base it is of", file=str(folder / CONFIG),
                        hint="name the base: arctic-train merge ADAPTER --into BASE OUT")
            )  # fmt: skip
        dtype = getattr(torch, TORCH_DTYPES[about["dtype"]]) if about else "auto"
        revision = None if base else config.get("revision")
        task = config.get("task_type") or tasks.CAUSAL
        model: PreTrainedModel = tasks.auto_class(task).from_pretrained(
            name, dtype=dtype, revision=revision, **tasks.with_labels(about)
        )
        if task == "FEATURE_EXTRACTION":
            without_pooler(model)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder) if has_tokenizer else name
        )
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise CheckpointError(f"{folder} cannot be loaded: {reason.strip()}") from error
    stated: dict[str, Any] = {
        key: about[key] for key in ("dtype", "quantization", "labels") if key in about
    }
    own = from_folder(
        model,
        folder,
        about={"name_or_path": name, "revision": revision, **stated},
        place="the adapter",
        task=task,
    )
    return own, tokenizer


def _short_targets(module: Any) -> set[str]:
    """The last parts of the targets' names, where these say the same; empty where they do not.

    peft writes `all-linear` out as whole names of every layer. Of a model whose pooler was taken away it
    is the whole names: those of others have one, which a short name could mean as well.
    """
    targeted = set(getattr(module.base_model, "targeted_module_names", ()))
    if getattr(module.get_base_model(), "pooler", module) is None:
        return set() if hasattr(module.peft_config[NAME], "feedforward_modules") else targeted
    short = {name.rpartition(".")[2] for name in targeted}
    names = (name for name, _ in module.get_base_model().named_modules())
    same = {name for name in names if name.rpartition(".")[2] in short} == targeted
    return short if same else set()


def _state(module: Any, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    import warnings

    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, Tensor] = get_peft_model_state_dict(
            module, state_dict=whole, adapter_name=NAME, save_embedding_layers=False
        )
    if took_from_base(module):
        state = as_lora(module, state)
    # Tied copies share memory, which safetensors does not write.
    return {name: tensor.clone().contiguous() for name, tensor in sorted(state.items())}
