"""A model's weights as safetensors files, written while they are gathered: one shard in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SHARD_BYTES = 5 * 10**9
"""The largest file, unless one layer's conversion alone is larger."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_LAYER = re.compile(r"(.*?\.\d+)\.")


def write_weights(
    module: nn.Module,
    folder: Path | None,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> BaseException | None:
    """Write the weights of a transformers model, by the names that its published checkpoints have.

    All ranks call it; `folder` is rank 0's, None elsewhere. Returns what went wrong in writing
    rather than raising it, after the last weight was gathered: other ranks are in that loop too.
    A module's `written_also` says under which further names others look for a weight: name → names.
    """
    again: Mapping[str, Sequence[str]] = getattr(module, "written_also", {})
    shards = _Shards(folder, shard_bytes=shard_bytes) if folder is not None else None
    error: BaseException | None = None
    for group in _layers(module):
        if shards is None or error is not None:
            continue
        try:
            converted = _as_published(module, group)
            for name, tensor in converted.items():
                floating = tensor.is_floating_point() and dtype is not None
                for one in (name, *again.get(name, ())):
                    shards.add(one, tensor.to(dtype) if floating else tensor)
        except (OSError, ValueError, RuntimeError) as problem:
            error = problem
    if shards is not None and error is None:
        try:
            shards.close()
        except (OSError, ValueError, RuntimeError) as problem:
            error = problem
    return error


def _layers(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The weights layer by layer; empty maps on other ranks than 0.

    Older checkpoints of mixtures of experts keep apart what transformers fuses in memory, always
    within a layer.
    """
    from arctic_like.engine.weights import iterate_weights

    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    group: dict[str, Tensor] = {}
    layer = ""
    for name, tensor in iterate_weights(module):
        match = _LAYER.match(name)
        here = match.group(1) if match else name
        if here != layer and group:
            yield group
            group = {}
        layer = here
        if tensor is not None and name not in ignored:
            group[name] = tensor
    yield group


def _as_published(module: nn.Module, group: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    if not group:
        return group
    published: dict[str, Tensor] = revert_weight_conversion(module, group)
    return published


class _Shards:
    """Collects tensors and writes a file whenever `shard_bytes` would be exceeded."""

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._files: list[list[str]] = []
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > self._limit:
            self._write()
        # Parts of one fused tensor share its memory, which safetensors does not write.
        self._tensors[name] = tensor.clone(memory_format=_contiguous())
        self._bytes += size
        self._total += size
        self._parameters += tensor.numel()

    def close(self) -> None:
        """Write the rest and give the files the names that tell their number."""
        self._write()
        count = len(self._files)
        if count == 1:
            self._temporary(0).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._files):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(index).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        content: dict[str, Any] = {
            "metadata": {"total_parameters": self._parameters, "total_size": self._total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self._tensors, self._temporary(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors = {}
        self._bytes = 0

    def _temporary(self, index: int) -> Path:
        return self._folder / f"shard-{index + 1:05d}.safetensors"


def _contiguous() -> Any:
    import torch

    return torch.contiguous_format
