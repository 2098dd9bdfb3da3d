"""From what a recipe states to the dictionary that DeepSpeed reads: one pure function.

The recipe's `deepspeed:` section is passed through. What the recipe states elsewhere (batch sizes,
accumulation, dtype) is filled in, and a section that says otherwise is refused with both places.
Knows numbers and maps only; neither torch nor DeepSpeed is imported.

Defaults that are not DeepSpeed's, and why:

- ZeRO stage 2, as in ArcticTraining: the most memory saved without gathering weights.
- `data_types.grad_accum_dtype` and `communication_data_type` are fp32 for bf16 and fp16 wherever
  DeepSpeed can (stages 1, 2, 3). Measured with DeepSpeed 0.19.8 on two ranks, 8 micro-batches, as
  the relative error against the float64 sum of the same bf16 gradients: 2.6e-3 (stage 1) and
  2.7e-3 (stages 2, 3) with neither and with fp32 communication alone; 1.9e-3 and 0.8e-3 with fp32
  accumulation alone; 2e-7 with both. At stage 1 fp32 accumulation makes DeepSpeed choose its
  BF16_Optimizer, which casts its fp32 sums to `communication_data_type` to reduce them, hence the
  1.9e-3. At stage 0 DeepSpeed refuses it (NotImplementedError): the error stays at 2.6e-3, with a
  warning. fp16 follows by analogy; it was not measured, as it needs a GPU.
  The price: four bytes in place of two for each reduced element and each kept gradient.
- Bucket sizes come from the model's width h, as transformers derives them for "auto": reduction
  h², prefetch 0.9 h², and parameters of up to 10 h elements stay whole at stage 3. A bucket has at
  least 2^20 elements: a small model would be reduced in thousands of pieces to save 4 MB.
- `timers.throughput` is off: it synchronises the device twice a micro-batch, and nobody reads it.
- Optimizers that DeepSpeed has not tested, and torch's own under offload, are allowed: the
  optimizer is a part of the recipe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from arctic_like.engine.ds_rules import Facts, deepspeed_problems
from arctic_like.engine.ds_section import (
    canonical_dtype,
    normal,
    offload_device,
    offloads_parameters,
    tensor_parallel_size,
    uses_offload,
    zero_stage,
)
from arctic_like.errors import RecipeError

__all__ = [
    "Facts",
    "deepspeed_config",
    "deepspeed_problems",
    "inexact",
    "offload_device",
    "offloads_parameters",
    "uses_offload",
    "zero_stage",
]

Config = dict[str, Any]

DEFAULT_CLIPPING = 1.0
SMALLEST_BUCKET = 2**20
LARGEST_BUCKET = 500_000_000
"""DeepSpeed's own default; a bucket derived from the model never exceeds it."""


def deepspeed_config(
    *,
    section: Mapping[str, Any],
    dtype: str,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    sequence_parallel_size: int = 1,
    hidden_size: int | None = None,
    on_cpu: bool = False,
) -> Config:
    """The dictionary for `deepspeed.initialize`.

    section: the recipe's `deepspeed:` as written; dtype: "bf16", "fp16" or "fp32" of `model.dtype`;
    world_size: number of data-parallel ranks, or of groups of `sequence_parallel_size` ranks, which DeepSpeed
    takes for ranks with data of their own (the trainer scales losses for it); hidden_size: the model's
    width, None if it has none (bucket sizes are then DeepSpeed's own); on_cpu: whether the run trains on
    the CPU.

    Raises RecipeError with every problem found: unknown keys, wrong types, contradictions.
    """
    facts = Facts(dtype, micro_batch_size, gradient_accumulation_steps, world_size, on_cpu)
    problems = deepspeed_problems(section, facts=facts)
    if problems:
        raise RecipeError(problems)
    return _filled(normal(section), facts, hidden_size, sequence_parallel_size)


def inexact(config: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing in a finished dictionary that makes gradients less exact."""
    zero = config.get("zero_optimization") or {}
    low = next((d for d in ("bf16", "fp16") if config.get(d, {}).get("enabled")), None)
    accumulation = (config.get("data_types") or {}).get("grad_accum_dtype", low or "fp32")
    communication = config.get("communication_data_type", low or "fp32")
    found = []
    if low and zero_stage(config) == 0:
        found.append(
            f"ZeRO stage 0 sums the micro-batches' {low} gradients in {low} "
            "(relative error about 3e-3); stages 1 to 3 sum them in fp32"
        )
    elif not _is_fp32(accumulation):
        found.append(f"data_types.grad_accum_dtype: gradients are summed in {accumulation}")
    if not _is_fp32(communication) and not (low and zero_stage(config) == 0):
        found.append(
            f"communication_data_type: gradients are averaged over ranks in {communication}"
        )
    for key, effect in _INEXACT_ZERO.items():
        if zero.get(key):
            found.append(f"zero_optimization.{key}: {effect}")
    for key, effect in _INEXACT_DTYPE.items():
        if any((config.get(d) or {}).get(key) for d in ("bf16", "fp16")):
            found.append(f"{key}: {effect}")
    if (config.get("torch_autocast") or {}).get("enabled"):
        found.append("torch_autocast: parts of the model compute in its dtype, not in model.dtype")
    if (config.get("data_efficiency") or {}).get("enabled"):
        found.append("data_efficiency: DeepSpeed may drop tokens inside the model")
    return found


_INEXACT_ZERO = {
    "zero_quantized_gradients": "gradients are quantised before they are averaged",
    "zero_quantized_weights": "weights are quantised when they are gathered",
    "zero_quantized_nontrainable_weights": "frozen weights are stored quantised",
    "zenflow": "unimportant gradients are applied late",
}

_INEXACT_DTYPE = {
    "bf16_master_weights_and_grads": "the weights that are updated have bf16 precision",
    "bf16_optimizer_states": "the optimizer's states have bf16 precision",
    "fp16_master_weights_and_grads": "the weights that are updated have fp16 precision",
}


def _filled(
    given: Config, facts: Facts, hidden_size: int | None, sequence_parallel_size: int
) -> Config:
    config = copy.deepcopy(given)
    config["train_micro_batch_size_per_gpu"] = facts.micro_batch_size
    config["gradient_accumulation_steps"] = facts.gradient_accumulation_steps
    # DeepSpeed checks it against the number of all ranks, and uses it for nothing here. Where ranks share
    # layers it checks twice, the second time against fewer.
    if tensor_parallel_size(given) == 1:
        config["train_batch_size"] = (facts.global_batch_size or 1) * sequence_parallel_size
    config.setdefault("gradient_clipping", DEFAULT_CLIPPING)
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    stage = zero_stage(given)
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = stage
    for key, size in _bucket_sizes(hidden_size, stage).items():
        zero.setdefault(key, size)
    if facts.dtype in ("bf16", "fp16"):
        config.setdefault(facts.dtype, {})["enabled"] = True
        if stage > 0:
            config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
            config.setdefault("communication_data_type", "fp32")
    return config


def _bucket_sizes(hidden_size: int | None, stage: int) -> dict[str, int]:
    if hidden_size is None or stage == 0:
        return {}
    square = hidden_size * hidden_size
    sizes = {"reduce_bucket_size": min(max(square, SMALLEST_BUCKET), LARGEST_BUCKET)}
    if stage == 3:
        prefetch = max(int(0.9 * square), SMALLEST_BUCKET)
        sizes["stage3_prefetch_bucket_size"] = min(prefetch, LARGEST_BUCKET)
        sizes["stage3_param_persistence_threshold"] = 10 * hidden_size
    return sizes


def _is_fp32(dtype: str) -> bool:
    return canonical_dtype(dtype) == "fp32"
