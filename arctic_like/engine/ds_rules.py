"""What a `deepspeed:` section may not say, although DeepSpeed knows the key: one rule a function.

A contradiction names both places; DeepSpeed itself would stop with an assertion, or obey quietly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from arctic_like.engine.ds_keys import check_deepspeed
from arctic_like.engine.ds_section import (
    TENSOR_PARALLEL,
    canonical_dtype,
    normal,
    offload_device,
    tensor_parallel_size,
    zero_stage,
)
from arctic_like.errors import Problem

NOT_HERE = {
    "optimizer": "State it as `optimizer:` at the top level: it is a part of the recipe.",
    "scheduler": "State it as `scheduler:` at the top level: it is a part of the recipe.",
    "managed_gradient_accumulation": "Remove it: the trainer says where a step ends.",
    "data_parallel_size": "Remove it: it follows from the number of processes.",
    "sequence_parallel_size": "State `sequence_parallel_size` at the top level of the recipe.",
    "dataloader_drop_last": "State `data.drop_last`; DeepSpeed's data loader is not used.",
    "autotuning": "Remove it: DeepSpeed's autotuner starts scripts of its own.",
}
"""Keys that DeepSpeed knows but that would act behind the trainer's back: key → way out."""


@dataclass(frozen=True)
class Facts:
    """What the recipe and the run state outside `deepspeed:`; None is not known yet."""

    dtype: str | None = None
    """`model.dtype`: "bf16", "fp16" or "fp32"."""
    micro_batch_size: int | None = None
    """Samples per rank and micro-batch."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per step."""
    world_size: int | None = None
    """Data-parallel ranks."""
    on_cpu: bool = False
    """Whether the run trains on the CPU."""

    @property
    def global_batch_size(self) -> int | None:
        """Samples per step over all ranks, if everything it follows from is known."""
        factors = (self.micro_batch_size, self.gradient_accumulation_steps, self.world_size)
        return None if None in factors else math.prod(f for f in factors if f is not None)


def deepspeed_problems(section: Mapping[str, Any], *, facts: Facts) -> list[Problem]:
    """What is wrong in a recipe's `deepspeed:` section, as far as the facts are known.

    Contradictions are looked for only where every key is known and every type right.
    """
    wrong = [
        Problem(p.message, place=_place(*p.path), hint=p.hint) for p in check_deepspeed(section)
    ]
    if wrong:
        return wrong
    given = normal(section)
    return [
        *_foreign(given),
        *_batch_contradictions(given, facts),
        *_dtype_contradictions(given, facts),
        *_impossible_offload(given),
        *division_problems(given, dtype=facts.dtype),
        *_impossible(given, facts),
    ]


def _foreign(given: Mapping[str, Any]) -> Iterator[Problem]:
    for key, way_out in NOT_HERE.items():
        if key in given:
            yield Problem("does not belong here", place=_place(key), hint=way_out)
    if given.get("gradient_allreduce_op", "mean") != "mean":
        yield Problem(
            f"is {given['gradient_allreduce_op']!r}; the trainer scales gradients for 'mean'",
            place=_place("gradient_allreduce_op"),
            hint="Remove it: the loss is the mean over the global batch's tokens in any case.",
        )
    if (given.get("checkpoint") or {}).get("load_universal"):
        yield Problem(
            "does not belong here",
            place=_place("checkpoint", "load_universal"),
            hint="Remove it: a checkpoint of another world size is converted when it is loaded.",
        )
    experts = int((given.get("expert_parallel") or {}).get("autoep_size", 0))
    if experts > 1:
        yield Problem(
            f"is {experts}; expert parallelism is not supported yet",
            place=_place("expert_parallel", "autoep_size"),
            hint="Remove it and use ZeRO stage 3 to share a large model among ranks, "
            "sequence_parallel_size to share long rows.",
        )


def division_problems(section: Mapping[str, Any], *, dtype: str | None) -> Iterator[Problem]:
    """What of DeepSpeed's own cannot be combined with layers that ranks share (`autotp_size`).

    section: with known keys; dtype: `model.dtype`.
    """
    given, size = normal(section), tensor_parallel_size(section)
    for key in sorted((given.get("tensor_parallel") or {}).keys() - {"autotp_size"}):
        yield Problem(
            "does not belong here",
            place=_place("tensor_parallel", key),
            hint="State autotp_size alone: which weights are divided follows from the model.",
        )
    if size == 1:
        return
    way_out = f"Remove it, or {TENSOR_PARALLEL}."
    zero = given.get("zero_optimization") or {}
    stage = zero_stage(given)
    if stage in _WRONG_IN_LOW_PRECISION and dtype not in (None, "fp32"):
        yield Problem(
            f"is {stage} in {dtype}, where DeepSpeed {_WRONG_IN_LOW_PRECISION[stage]}, "
            f"but {TENSOR_PARALLEL} is {size}",
            place=_place("zero_optimization", "stage"),
            hint="Use stage 2 or 3.",
        )
    for key in _UNDIVIDED:
        value = zero.get(key)
        if value and not (key.startswith("offload") and offload_device(given, key) == "none"):
            yield Problem(
                f"cannot be combined with {TENSOR_PARALLEL} ({size})",
                place=_place("zero_optimization", key),
                hint=way_out,
            )


_WRONG_IN_LOW_PRECISION = {
    0: "takes norms in ways that were not tried with layers that ranks share",
    1: "finds gradient norms up to three times too large",
}
"""Stage → why not. Stage 1: measured with DeepSpeed 0.19.8 in bf16, 4.81 for 1.65; stages 2 and 3 to 3e-4."""

_UNDIVIDED = (
    "offload_optimizer", "offload_param", "zero_hpz_partition_size", "mics_shard_size", "zenflow",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
)  # fmt: skip
"""Keys of ZeRO that were not tried with layers that ranks share, or make groups of ranks themselves."""


def _batch_contradictions(given: Mapping[str, Any], facts: Facts) -> Iterator[Problem]:
    product = (
        f"micro_batch_size ({facts.micro_batch_size}) × gradient_accumulation_steps "
        f"({facts.gradient_accumulation_steps}) × data-parallel ranks ({facts.world_size})"
    )
    for key, value, source in (
        ("train_micro_batch_size_per_gpu", facts.micro_batch_size, "micro_batch_size"),
        (
            "gradient_accumulation_steps",
            facts.gradient_accumulation_steps,
            "gradient_accumulation_steps",
        ),
        ("train_batch_size", facts.global_batch_size, product),
    ):
        if value is not None and given.get(key, value) != value:
            yield Problem(
                f"is {given[key]}, but {source} is {value}",
                place=_place(key),
                hint="Remove it from deepspeed: the recipe's value is filled in.",
            )


def _dtype_contradictions(given: Mapping[str, Any], facts: Facts) -> Iterator[Problem]:
    if "bf16" in given and "bfloat16" in given:
        yield Problem(
            "stands beside bf16, its other name", place=_place("bfloat16"), hint="Keep one."
        )
    if facts.dtype is None:
        return
    way_out = "Set model.dtype and remove it here."
    for name in ("bf16", "fp16"):
        enabled = (given.get(name) or {}).get("enabled")
        if enabled is not None and enabled != (facts.dtype == name):
            yield Problem(
                f"is {str(enabled).lower()}, but model.dtype is {facts.dtype}",
                place=_place(name, "enabled"),
                hint=way_out,
            )
    stored = (given.get("data_types") or {}).get("param_dtype", facts.dtype)
    if canonical_dtype(stored) != facts.dtype:
        yield Problem(
            f"is {stored}, but model.dtype is {facts.dtype}",
            place=_place("data_types", "param_dtype"),
            hint=way_out,
        )


def _impossible_offload(given: Mapping[str, Any]) -> Iterator[Problem]:
    stage = zero_stage(given)
    zero = given.get("zero_optimization") or {}
    for key, lowest, reason in (
        ("offload_param", 3, "only stage 3 divides parameters among ranks"),
        ("offload_optimizer", 1, "stage 0 keeps optimizer states whole on the device"),
    ):
        device = offload_device(given, key)
        if device != "none" and stage < lowest:
            yield Problem(
                f"needs ZeRO stage {lowest}{'' if lowest == 3 else ' or higher'}, "
                f"but zero_optimization.stage is {stage}: {reason}",
                place=_place("zero_optimization", key),
                hint=f"Set deepspeed.zero_optimization.stage to {lowest}, or remove the offload.",
            )
        if device == "nvme" and not zero[key].get("nvme_path"):
            yield Problem(
                "is nvme, but there is no nvme_path",
                place=_place("zero_optimization", key, "device"),
                hint=f"Set deepspeed.zero_optimization.{key}.nvme_path to a folder on that disk.",
            )
    partial = zero.get("offload_optimizer") or {}
    for key, default in (("ratio", 1), ("super_offload", False)):
        if partial.get(key, default) != default and stage != 3:
            yield Problem(
                f"is {partial[key]}, which needs ZeRO stage 3, but the stage is {stage}",
                place=_place("zero_optimization", "offload_optimizer", key),
                hint="Set deepspeed.zero_optimization.stage to 3, or remove it.",
            )


def _impossible(given: Mapping[str, Any], facts: Facts) -> Iterator[Problem]:
    stage = zero_stage(given)
    zero = given.get("zero_optimization") or {}
    if facts.dtype == "fp16" and facts.on_cpu:
        yield Problem(
            "is fp16, which DeepSpeed cannot train on a CPU",
            place="model.dtype",
            hint="Use bf16 or fp32 here, or a GPU.",
        )
    accumulation = (given.get("data_types") or {}).get("grad_accum_dtype")
    if facts.dtype and accumulation and stage == 0 and canonical_dtype(accumulation) != facts.dtype:
        higher = "Use zero_optimization.stage 1, 2 or 3, where fp32 is the default, or remove it."
        yield Problem(
            f"is {accumulation}, but at ZeRO stage 0 DeepSpeed sums {facts.dtype} gradients "
            f"in {facts.dtype} only",
            place=_place("data_types", "grad_accum_dtype"),
            hint="Remove it." if facts.dtype == "fp32" else higher,
        )
    if zero.get("allgather_bucket_size", 2) % 2:
        yield Problem(
            f"is {zero['allgather_bucket_size']}; DeepSpeed needs an even number",
            place=_place("zero_optimization", "allgather_bucket_size"),
            hint="Round it up.",
        )
    if zero.get("compute_grad_norm") is False:
        yield Problem(
            "is false, but clipping, the metrics and the watch for NaN read the norm",
            place=_place("zero_optimization", "compute_grad_norm"),
            hint="Remove it.",
        )
    if zero.get("legacy_stage1"):
        yield Problem(
            "is true, which DeepSpeed no longer has",
            place=_place("zero_optimization", "legacy_stage1"),
            hint="Remove it.",
        )


def _place(*path: str) -> str:
    return ".".join(("deepspeed", *path))
