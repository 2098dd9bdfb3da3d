"""Weights on the disk as name → tensor, whatever wrote them: exports, checkpoints of runs, plain files."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from arctic_like.checkpoint.layout import ENGINE, complete_checkpoints
from arctic_like.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FILES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


def read_any(path: Path) -> dict[str, Tensor]:
    """All weights of a file or folder, on the CPU, as they were written.

    path: a `.safetensors`, `.pt`, `.pth` or `.bin` file; a Hugging Face folder; a run's checkpoint
    (`step-N`), or a run directory, of which the newest counts. Raises CheckpointError.
    """
    if path.is_file():
        return _file(path)
    if (path / ENGINE).is_dir():
        return read_weights(path)
    for name in INDEXES:
        if (path / name).is_file():
            shards = set(json.loads((path / name).read_text())["weight_map"].values())
            return {k: v for shard in sorted(shards) for k, v in _file(path / shard).items()}
    for name in FILES:
        if (path / name).is_file():
            return _file(path / name)
    if complete := complete_checkpoints(path / "checkpoints"):
        return read_weights(complete[-1])
    raise CheckpointError(
        f"{path} holds no weights\n    give a .safetensors or .pt file, a Hugging Face folder, "
        "a run directory or a checkpoint in it"
    )


def _file(path: Path) -> dict[str, Tensor]:
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise whatever their formats make them
        raise CheckpointError(f"the weights in {path} cannot be read: {error}") from error
    for key in ("state_dict", "model", "module", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not weights by name")
    return {str(k): v for k, v in content.items() if torch.is_tensor(v)}


def read_weights(checkpoint: Path, *, tag: str = ENGINE) -> dict[str, Tensor]:
    """All weights of a `deepspeed` checkpoint on the CPU: as trained, or in fp32 from ZeRO-3.

    At ZeRO 0 to 2 one file has them whole; the shards of ZeRO-3 are put together from the fp32
    master weights, of which the trained ones are the rounding. Where ranks shared layers, the same is done
    for each of the parts, and they are joined. Raises CheckpointError.
    """
    import torch

    folder = checkpoint / tag
    try:
        parts = [_part(folder, rank) for rank in range(_parts_in(folder))]
        found = parts[0]
        for name, dim in _divided(folder).items():
            found[name] = torch.cat([part[name] for part in parts], dim)
        return found
    except Exception as error:  # torch and deepspeed raise whatever their formats make them
        raise CheckpointError(f"the weights in {checkpoint} cannot be read: {error}") from error


def _parts_in(folder: Path) -> int:
    """Among how many ranks layers were divided."""
    names = (re.search(r"mp_rank_(\d+)_model_states", path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in names if match), default=0) + 1


def _divided(folder: Path) -> dict[str, int]:
    """Name → dimension of the weights of which files hold parts."""
    path = folder / "shapes.json"
    return dict(json.loads(path.read_text()).get("divided", {})) if path.is_file() else {}


def _part(folder: Path, rank: int) -> dict[str, Tensor]:
    """The weights that one of the ranks had which shared layers."""
    import torch

    suffix = f"mp_rank_{rank:02d}_"
    whole = folder / f"{suffix}model_states.pt"
    if whole.is_file():
        return dict(torch.load(whole, map_location="cpu", weights_only=True)["module"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # DeepSpeed's function takes all files for one model's, and prints its progress.
    with tempfile.TemporaryDirectory() as links:
        here = Path(links) / folder.name
        here.mkdir()
        for path in folder.glob(f"*{suffix}*.pt"):
            (here / path.name.replace(suffix, "mp_rank_00_")).symlink_to(path.resolve())
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return dict(get_fp32_state_dict_from_zero_checkpoint(links, tag=folder.name))
