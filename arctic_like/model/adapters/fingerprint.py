"""A fingerprint of a model's weights: names, shapes, dtypes and a fixed sample of the values.

An adapter belongs to one base, and a frozen base is not saved with what was trained; the fingerprint says
whether a model is that base. It reads 64 values of each parameter, and at ZeRO-3 nothing is gathered: every
rank reads what it holds of the sample, and one reduction brings the ranks' parts together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "base_model.json"
"""In an adapter's folder: which base it belongs to."""

SAMPLE = 64
"""Values of each parameter that are looked at; all of a smaller one."""
_STRIDE = 0x9E3779B1
_SHOWN = 3


def fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> dict[str, Any]:
    """`{"digest": …, "weights": {name: {"shape", "dtype", "values", "bf16"}}}`. Collective at ZeRO-3.

    without: names of parameters that an adapter has its own of, so the base's do not matter.
    `values` and `bf16` are hashes of the sample as it is and rounded to bfloat16, by which a model can be
    told in another dtype too. Shared parameters count once, under their first name. Parameters that are
    not floating point (quantised ones) have neither: what they hold depends on the quantisation.
    """
    parameters = {name: p for name, p in model.named_parameters() if name not in without}
    samples = _samples(parameters)
    weights = {
        name: {
            "shape": list(_shape(parameter)),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            **(_hashes(samples[name]) if name in samples else {}),
        }
        for name, parameter in parameters.items()
    }
    whole = hashlib.blake2b(repr(sorted(weights.items())).encode(), digest_size=16)
    return {"digest": whole.hexdigest(), "weights": weights}


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How another model is not the expected one, as the end of a sentence; empty where it is.

    Only weights whose values are known of both are compared by value.
    """
    if expected["digest"] == found["digest"]:
        return ""
    wanted, there = expected["weights"], found["weights"]
    if missing := [name for name in wanted if name not in there]:
        return f"it has no {_some(missing)}"
    if extra := [name for name in there if name not in wanted]:
        return f"it has {_some(extra)} besides"
    known = [name for name in wanted if "values" in wanted[name]]
    other = [
        f"{name} ({there[name]['shape']}, not {wanted[name]['shape']})"
        for name in known
        if wanted[name]["shape"] != there[name]["shape"]
    ]
    if other:
        return f"it has another shape of {_some(other)}"
    other = [name for name in known if not _same_values(wanted[name], there[name])]
    return f"it has other values of {_some(other)}" if other else ""


def read(folder: Path) -> dict[str, Any] | None:
    """What an adapter's folder says of its base; None where another program wrote it."""
    try:
        content = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "fingerprint" in content else None


def _same_values(wanted: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    key = "values" if wanted["dtype"] == there["dtype"] else "bf16"
    return bool(wanted[key] == there.get(key))


def sample_places(count: int) -> list[int]:
    """The flat positions of a parameter of `count` elements that are looked at, in a fixed order."""
    if count <= SAMPLE:
        return list(range(count))
    return [(number * _STRIDE + 1) % count for number in range(SAMPLE)]


def _some(names: list[str]) -> str:
    more = f" … +{len(names) - _SHOWN}" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _hashes(bits: Tensor) -> dict[str, str]:
    """Of float32 values that are given as int32 bits."""
    import torch

    values = bits.view(torch.float32)
    kinds = {"values": values, "bf16": values.bfloat16().float()}
    return {
        key: hashlib.blake2b(tensor.numpy().tobytes(), digest_size=8).hexdigest()
        for key, tensor in kinds.items()
    }


def _samples(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Name → the sampled values as bits of float32, int32."""
    import torch

    floating = {name: p for name, p in parameters.items() if p.is_floating_point()}
    shared = [p for p in floating.values() if hasattr(p, "ds_id")]
    found = {
        name: torch.zeros(len(sample_places(_count(p))), dtype=torch.int32)
        for name, p in floating.items()
    }
    for name, parameter in floating.items():
        held, start = _held(parameter)
        places = sample_places(_count(parameter))
        mine = [(i, place - start) for i, place in enumerate(places)
                if start <= place < start + held.numel()]  # fmt: skip
        if mine:
            slots, offsets = zip(*mine, strict=True)
            index = torch.tensor(offsets, device=held.device)
            values = held.index_select(0, index).float().cpu()
            found[name][torch.tensor(slots)] = values.view(torch.int32)
    if shared:
        _sum_over_ranks(found, [name for name, p in floating.items() if hasattr(p, "ds_id")],
                        group=shared[0].ds_process_group)  # type: ignore[attr-defined]  # fmt: skip
    return found


def _count(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _held(parameter: Any) -> tuple[Tensor, int]:
    """What this rank holds of a parameter, flat, and where that begins in the whole one."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().reshape(-1), 0
    shard = parameter.ds_tensor.detach().reshape(-1)
    start = parameter.ds_zero_partition_rank * shard.numel()
    return shard[: max(0, int(parameter.ds_numel) - start)], start  # the last shard is padded


def _sum_over_ranks(found: dict[str, Tensor], names: list[str], *, group: Any) -> None:
    # Every place is held by one rank and zero elsewhere: a sum of bits as whole numbers is exact.
    import torch
    import torch.distributed as dist
    from deepspeed.accelerator import get_accelerator

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    device = get_accelerator().current_device_name()
    bits = torch.cat([found[name] for name in names]).to(device)
    dist.all_reduce(bits, group=group)
    parts = torch.split(bits.cpu(), [found[name].numel() for name in names])
    found.update(zip(names, parts, strict=True))
