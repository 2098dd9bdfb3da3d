"""Reading a recipe's `deepspeed:` section: one spelling for what can be said in several ways.

Pure functions over maps; expects a section in which `ds_keys.check_deepspeed` found nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from arctic_like.engine.ds_keys import AUTO, KEYS, Kind, as_number

DEFAULT_STAGE = 2
"""The ZeRO stage where the recipe states none; why, see `ds_config`."""
TENSOR_PARALLEL = "deepspeed.tensor_parallel.autotp_size"
"""Where a recipe says that ranks share layers."""


def normal(section: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy in which every key has its current name."""
    given = _plain(section, KEYS)
    if "bfloat16" in given and "bf16" not in given:
        given["bf16"] = given.pop("bfloat16")
    zero = given.get("zero_optimization", {})
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, None):
            zero.setdefault(new, {}).setdefault("device", "cpu")
    if zero.pop("stage3_gather_fp16_weights_on_model_save", None):
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return given


def _plain(section: Mapping[str, Any], keys: Mapping[str, Kind], path: str = "") -> dict[str, Any]:
    """A copy without "auto" and empty sections, with numbers as numbers."""
    plain: dict[str, Any] = {}
    for key, value in section.items():
        kind = keys[key]
        if (value == "auto" and path + key in AUTO) or (
            isinstance(kind, Mapping) and value is None
        ):
            continue
        if isinstance(kind, Mapping):
            plain[key] = _plain(value, kind, f"{path}{key}.")
        elif kind in ("any", "text", "text?") or not isinstance(value, str):
            whole = isinstance(value, float) and str(kind).rstrip("?") in (
                "int",
                "count",
                "positive",
            )
            plain[key] = int(value) if whole else copy.deepcopy(value)
        else:
            number = None if isinstance(kind, tuple) else as_number(value)
            plain[key] = value if number is None else number
    return plain


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage of a section or of a finished dictionary."""
    stage = (config.get("zero_optimization") or {}).get("stage", DEFAULT_STAGE)
    return DEFAULT_STAGE if stage == "auto" else int(stage)


def tensor_parallel_size(section: Mapping[str, Any] | None) -> int:
    """Among how many ranks DeepSpeed divides layers: `tensor_parallel.autotp_size`, 1 where it is off."""
    stated = ((section or {}).get("tensor_parallel") or {}).get("autotp_size") or 0
    return max(1, int(as_number(stated) or 1) if isinstance(stated, str) else int(stated))


def uses_offload(config: Mapping[str, Any]) -> bool:
    """Whether optimizer states live, and the update runs, outside the training device."""
    return offload_device(config, "offload_optimizer") != "none"


def offloads_parameters(config: Mapping[str, Any]) -> bool:
    """Whether parameters live outside the training device between their uses (stage 3)."""
    return offload_device(config, "offload_param") != "none"


def offload_device(config: Mapping[str, Any], key: str) -> str:
    """Where "offload_optimizer" or "offload_param" keeps its tensors; "none" is the device."""
    zero = config.get("zero_optimization") or {}
    device = (zero.get(key) or {}).get("device", "none")
    return "none" if device == "auto" else str(device)


def canonical_dtype(dtype: str) -> str:
    """DeepSpeed's names of a dtype ("bfloat16", "bf16") as one."""
    names = {
        "float32": "fp32",
        "float": "fp32",
        "float16": "fp16",
        "half": "fp16",
        "bfloat16": "bf16",
    }
    return names.get(dtype, dtype)
