"""The keys and types of DeepSpeed's configuration: a recipe's `deepspeed:` is checked strictly.

DeepSpeed itself checks only those sections that are pydantic models and ignores a misspelt key
anywhere else, so the table stands here, as data. `tests/engine/test_ds_keys.py` compares it with
the installed DeepSpeed: with its models, and with every key that its parser asks for.

Pure Python: `validate` uses it without importing torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from arctic_like.config.values import parse_number

Kind = str | tuple[Any, ...] | Mapping[str, Any]
"""What a value may be.

A map: a section with these keys. A tuple: one of these values. A word: "flag" (true or false),
"int", "count" (int ≥ 0), "positive" (int > 0), "number", "nonnegative" (number ≥ 0), "fraction"
(number in 0 … 1), "text", "texts" (a list of text), "list", "map" (any keys), "any"; with a "?"
also null.
"""

DTYPES = ("fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half")
AUTOCAST = (*DTYPES, "torch.float32", "torch.float16", "torch.bfloat16")
COMMUNICATION = ("fp32", "fp16", "bf16")

_FLAG = {"enabled": "flag"}

OFFLOAD_OPTIMIZER: dict[str, Kind] = {
    "device": ("none", "cpu", "nvme"), "nvme_path": "text?", "buffer_count": "count",
    "pin_memory": "flag", "pipeline_read": "flag", "pipeline_write": "flag", "fast_init": "flag",
    "ratio": "fraction", "super_offload": "flag", "cpuadam_cores_perc": "fraction",
}  # fmt: skip

OFFLOAD_PARAM: dict[str, Kind] = {
    "device": ("none", "cpu", "nvme"), "nvme_path": "text?", "buffer_count": "count",
    "buffer_size": "count", "max_in_cpu": "count", "pin_memory": "flag",
}  # fmt: skip

ZENFLOW: dict[str, Kind] = {
    "topk_ratio": "fraction", "select_strategy": ("auto", "step", "epoch"),
    "select_interval": "any",
    "update_interval": "any", "overlap_step": "flag", "offload": "flag", "auto_ratio": "fraction",
    "full_warm_up_rounds": "int", "pt_reserved_cores_perc": "fraction", "steps_per_epoch": "int?",
}  # fmt: skip

ZERO: dict[str, Kind] = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": "flag", "reduce_scatter": "flag", "reduce_bucket_size": "positive",
    "use_multi_rank_bucket_allreduce": "flag", "allgather_partitions": "flag",
    "allgather_bucket_size": "count", "overlap_comm": "flag?", "compute_grad_norm": "flag",
    "load_from_fp32_weights": "flag", "elastic_checkpoint": "flag",
    "offload_param": OFFLOAD_PARAM, "offload_optimizer": OFFLOAD_OPTIMIZER, "zenflow": ZENFLOW,
    "sub_group_size": "count",
    "cpu_offload_param": "flag?", "cpu_offload_use_pin_memory": "flag?", "cpu_offload": "flag?",
    "stage3_prefetch_bucket_size": "count", "stage3_param_persistence_threshold": "count",
    "stage3_model_persistence_threshold": "count", "stage3_max_live_parameters": "count",
    "stage3_max_reuse_distance": "count", "stage3_gather_16bit_weights_on_model_save": "flag",
    "stage3_module_granularity_threshold": "int", "stage3_use_all_reduce_for_fetch_params": "flag",
    "stage3_allgather_sequential": "flag", "stage3_gather_fp16_weights_on_model_save": "flag",
    "ignore_unused_parameters": "flag", "legacy_stage1": "flag", "round_robin_gradients": "flag",
    "parameter_alignment": "flag", "zero_hpz_partition_size": "count",
    "zero_quantized_weights": "flag", "zero_quantized_nontrainable_weights": "flag",
    "zero_quantized_gradients": "flag", "memory_efficient_linear": "flag",
    "pipeline_loading_checkpoint": "flag", "override_module_apply": "flag",
    "log_trace_cache_warnings": "flag", "enable_sanity_checks": "flag",
    "save_muon_momentum_buffer_in_memory": "flag",
    "leaf_module": {"classes": "texts", "names": "texts", "name_suffixes": "texts"},
}  # fmt: skip

BF16: dict[str, Kind] = {
    "enabled": "flag", "immediate_grad_update": "flag", "check_grad_overflow": "flag",
    "bf16_master_weights_and_grads": "flag", "bf16_optimizer_states": "flag",
}  # fmt: skip

FP16: dict[str, Kind] = {
    "enabled": "flag", "auto_cast": "flag", "loss_scale": "nonnegative",
    "initial_scale_power": "int",
    "loss_scale_window": "int", "hysteresis": "int", "consecutive_hysteresis": "flag",
    "min_loss_scale": "int", "fp16_master_weights_and_grads": "flag",
}  # fmt: skip

TENSOR_PARALLEL: dict[str, Kind] = {
    "dtype": "any", "autotp_size": "int", "tp_overlap_comm": "flag",
    "vocab_parallel_lm_head": "flag?",
    "vocab_parallel_ce_backend": ("torch", "liger"),
    "tp": {"tp_size": "int", "tp_grain_size": "int", "mpu": "any", "tp_group": "any"},
    "injection_policy_tuple": "list?", "partition_config": "map?", "preset_model": "text?",
    "keep_module_on_host": "flag", "kernel_inject": "flag",
}  # fmt: skip

EXPERT_PARALLEL: dict[str, Kind] = {
    "enabled": "flag", "autoep_size": "int", "expert_tensor_parallel_size": "int",
    "validate_folding_routing": "flag", "async_split_plan": "flag", "preset_model": "text?",
    "moe_layer_pattern": "text?", "expert_pattern": "text?", "router_pattern": "text?",
    "use_grouped_mm": "flag", "disable_triton_grouped_mm": "flag", "route_norm": "flag?",
    "route_scale": "number", "score_apply": ("auto", "pre", "post"),
    "combine_impl": ("auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"),
    "row_weighting_impl": ("auto", "eager", "fused"), "gate_up_impl": ("separate", "fused"),
    "comm_backend": ("comm", "deepep"), "comm_num_sm": "int", "comm_qp_margin": "int",
    "comm_max_tokens_per_rank": "int", "num_expert_groups": "int?", "num_limited_groups": "int?",
    "score_func": ("auto", "softmax", "sigmoid"), "top_k": "any", "load_balance_coeff": "any",
    "routed_scaling_factor": "any", "expert_w1": "text?", "expert_w2": "text?",
    "expert_w3": "text?",
    "num_experts_attr": "text?", "top_k_attr": "text?", "has_shared_experts": "flag?",
    "shared_experts_pattern": "text?", "shared_experts_gate_pattern": "text?",
    "expert_activation": "text?",
}  # fmt: skip

COMPILE: dict[str, Kind] = {
    "deepcompile": "flag", "autoep_non_moe": "flag", "free_activation": "flag",
    "free_activation_threshold": "int", "offload_activation": "flag",
    "offload_activation_pin_memory": "flag", "offload_opt_states": "flag", "double_buffer": "flag",
    "symmetric_memory": "flag", "debug_log": "flag", "offload_parameters": "flag",
    "sync_before_reduce": "flag", "sync_after_reduce": "flag", "sync_before_allgather": "flag",
    "sync_after_allgather": "flag", "keep_int_input_tensors": "flag",
    "keep_all_input_tensors": "flag", "passes": "list?",
}  # fmt: skip

CHECKPOINT: dict[str, Kind] = {
    "tag_validation": (
        "Ignore", "Warn", "Fail", "IGNORE", "WARN", "FAIL", "ignore", "warn", "fail",
    ),
    "load_universal": "flag", "use_node_local_storage": "flag", "checkpoint_serialization": "flag",
    "parallel_write": {"pipeline_stage": "flag"},
    "writer": {
        "type": ("mock", "python", "fast", "MOCK", "PYTHON", "FAST"), "decoupled": "flag",
        "io_buffer_size": "positive", "io_buffer_double": "flag", "show_statistics": "flag",
        "data_parallel": ("replica", "socket", "machine", "REPLICA", "SOCKET", "MACHINE"),
        "io_multiplier": "positive",
    },
}  # fmt: skip

DATA_EFFICIENCY: dict[str, Kind] = {
    "enabled": "flag", "seed": "int",
    "data_sampling": {
        "enabled": "flag", "num_epochs": "int", "num_workers": "int", "pin_memory": "flag",
        "curriculum_learning": "map", "dynamic_batching": "map",
    },
    "data_routing": {"enabled": "flag", "random_ltd": "map"},
}  # fmt: skip

AUTOTUNING: dict[str, Kind] = {
    "enabled": "flag", "fast": "flag", "results_dir": "text", "exps_dir": "text",
    "overwrite": "flag",
    "start_profile_step": "int", "end_profile_step": "int", "metric": "text",
    "metric_path": "text?",
    "tuner_type": "text", "tuner_early_stopping": "int", "tuner_num_trials": "int",
    "arg_mappings": "map?", "max_train_batch_size": "int?", "min_train_batch_size": "int",
    "max_train_micro_batch_size_per_gpu": "int", "min_train_micro_batch_size_per_gpu": "int",
    "num_tuning_micro_batch_sizes": "int", "mp_size": "int", "model_info_path": "text?",
    "model_info": {
        "profile": "flag", "num_params": "int?", "hidden_size": "int?", "num_layers": "int?",
    },
}  # fmt: skip

KEYS: dict[str, Kind] = {
    "train_batch_size": "positive", "train_micro_batch_size_per_gpu": "positive",
    "gradient_accumulation_steps": "positive", "managed_gradient_accumulation": "flag",
    "gradient_clipping": "nonnegative", "prescale_gradients": "flag",
    "gradient_predivide_factor": "number", "gradient_allreduce_op": ("mean", "sum"),
    "communication_data_type": COMMUNICATION, "seq_parallel_communication_data_type": COMMUNICATION,
    "zero_optimization": ZERO, "zero_allow_untested_optimizer": "flag",
    "zero_force_ds_cpu_optimizer": "flag",
    "bf16": BF16, "bfloat16": BF16, "fp16": FP16,
    "torch_autocast": {"enabled": "flag", "dtype": AUTOCAST, "lower_precision_safe_modules": "texts"},
    "data_types": {
        "grad_accum_dtype": DTYPES, "param_dtype": DTYPES, "buffer_dtype": DTYPES,
        "keep_in_fp32_modules": "any",
    },
    "optimizer": {"type": "text", "params": "map", "legacy_fusion": "flag"},
    "scheduler": {"type": "text", "params": "map"},
    "activation_checkpointing": {
        "partition_activations": "flag", "number_checkpoints": "int?",
        "contiguous_memory_optimization": "flag", "synchronize_checkpoint_boundary": "flag",
        "profile": "flag", "cpu_checkpointing": "flag",
    },
    "checkpoint": CHECKPOINT, "datastates_ckpt": "any",
    "tensor_parallel": TENSOR_PARALLEL, "expert_parallel": EXPERT_PARALLEL,
    "use_data_before_expert_parallelism": "flag", "pipeline": "map",
    "sequence_parallel_size": "positive", "data_parallel_size": "positive",
    "compile": COMPILE,
    "hybrid_engine": {
        "enabled": "flag", "max_out_tokens": "positive", "inference_tp_size": "int",
        "release_inference_cache": "flag", "pin_parameters": "flag",
        "tp_gather_partition_size": "int",
        "enable_cuda_graph": "flag",
    },
    "weight_quantization": {
        "enabled": "flag", "num_bits": "int", "q_type": ("asymmetric", "symmetric"),
        "q_groups": "int",
        "quantized_initialization": "map", "post_init_quant": "map",
    },
    "data_efficiency": DATA_EFFICIENCY, "dataloader_drop_last": "flag", "autotuning": AUTOTUNING,
    "aio": {
        "block_size": "positive", "queue_depth": "positive", "intra_op_parallelism": "positive",
        "single_submit": "flag", "overlap_events": "flag", "use_gds": "flag",
    },
    "steps_per_print": "positive?", "wall_clock_breakdown": "flag", "memory_breakdown": "flag",
    "dump_state": "flag", "disable_python_gc": "flag", "disable_allgather": "flag",
    "vocabulary_size": "positive?", "log_level": "text?",
    "timers": {"throughput": {"enabled": "flag", "synchronized": "flag"}},
    "flops_profiler": {
        "enabled": "flag", "recompute_fwd_factor": "number", "profile_step": "int",
        "module_depth": "int", "top_modules": "int", "detailed": "flag", "output_file": "text?",
    },
    "comms_logger": {
        "enabled": "flag", "prof_all": "flag", "prof_ops": "list", "verbose": "flag",
        "debug": "flag",
    },
    "tensorboard": {"enabled": "flag", "output_path": "text", "job_name": "text"},
    "csv_monitor": {"enabled": "flag", "output_path": "text", "job_name": "text"},
    "wandb": {"enabled": "flag", "group": "text?", "team": "text?", "project": "text"},
    "comet": {
        "enabled": "flag", "samples_log_interval": "int", "project": "text?", "workspace": "text?",
        "api_key": "text?", "experiment_name": "text?", "experiment_key": "text?",
        "online": "flag?",
        "mode": "text?",
    },
}  # fmt: skip

REMOVED: dict[str, str] = {
    "nebula": "Nebula checkpoints are gone from DeepSpeed",
    "compression_training": "the compression library is gone from DeepSpeed",
    "amp": "Apex is gone from DeepSpeed; set model.dtype to bf16 or fp16",
    "quantize_training": "mixture-of-quantization is gone from DeepSpeed",
    "sparse_gradients": "sparse embedding gradients are gone from DeepSpeed",
    "eigenvalue": "eigenvalue-based quantization is gone from DeepSpeed",
    "sparse_attention": "sparse attention is gone from DeepSpeed",
    "elasticity": "elastic training is gone from DeepSpeed; state the batch sizes in the recipe",
    "graph_harvesting": "graph harvesting is gone from DeepSpeed",
    "curriculum_learning": "use data_efficiency.data_sampling.curriculum_learning",
    "progressive_layer_drop": "progressive layer dropping is gone from DeepSpeed",
    "zero_optimization.mics_shard_size": "MiCS is gone from DeepSpeed",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is gone from DeepSpeed",
    "zero_optimization.zeropp_loco_param": "LoCo is gone from DeepSpeed",
}
"""Keys that older recipes may have and DeepSpeed refuses: dotted path → what became of it."""

AUTO = frozenset(
    {
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping", "bf16.enabled", "bfloat16.enabled", "fp16.enabled",
        "zero_optimization.stage", "zero_optimization.reduce_bucket_size",
        "zero_optimization.allgather_bucket_size", "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.nvme_path",
        "zero_optimization.offload_param.device", "zero_optimization.offload_param.nvme_path",
    }
)  # fmt: skip
"""Dotted paths where transformers' and accelerate's users write "auto"; here: as if not given."""


@dataclass(frozen=True)
class DSProblem:
    """One thing that is wrong in a `deepspeed:` section."""

    path: tuple[str, ...]
    """Keys from the section down, without `deepspeed` itself."""
    message: str
    hint: str = ""


def check_deepspeed(section: Mapping[str, Any]) -> list[DSProblem]:
    """All unknown keys and wrong types of a recipe's `deepspeed:` section, in its order."""
    return list(_check_map(section, KEYS, ()))


def as_number(value: Any) -> int | float | None:
    """`value` as a finite number, also from text as people write it ("5e8", "50M"); else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        exact = parse_number(value) if isinstance(value, str) else Fraction(value)
    except ValueError:
        return None
    return int(exact) if exact.denominator == 1 else float(exact)


def kind_of(path: tuple[str, ...]) -> Kind | None:
    """What the table says of a path; None for one that it does not know."""
    kind: Kind = KEYS
    for key in path:
        if not isinstance(kind, Mapping) or key not in kind:
            return None
        kind = kind[key]
    return kind


def _check_map(
    section: Mapping[str, Any], keys: Mapping[str, Kind], path: tuple[str, ...]
) -> Iterator[DSProblem]:
    for key, value in section.items():
        here = (*path, str(key))
        if key not in keys:
            yield _unknown(str(key), keys, here)
            continue
        kind = keys[key]
        if value == "auto" and ".".join(here) in AUTO:
            continue
        if not isinstance(kind, Mapping):
            rule = _broken_rule(value, kind)
            if rule:
                yield DSProblem(here, f"is {value!r}, not {rule}", _hint(value))
        elif isinstance(value, Mapping):
            yield from _check_map(value, kind, here)
        elif value is not None or not path:
            yield DSProblem(here, f"is {value!r}, not a section", f"Known keys: {', '.join(kind)}.")


def _unknown(key: str, keys: Mapping[str, Kind], path: tuple[str, ...]) -> DSProblem:
    gone = REMOVED.get(".".join(path))
    if gone:
        return DSProblem(path, f"is no key of DeepSpeed any more: {gone}", "Remove it.")
    near = difflib.get_close_matches(key, keys, n=1)
    if near:
        return DSProblem(path, "is no key of DeepSpeed", f"Did you mean {near[0]!r}?")
    elsewhere = [place for place in _places(key, KEYS) if place != path]
    if elsewhere:
        places = " or ".join(".".join(("deepspeed", *place)) for place in elsewhere[:2])
        return DSProblem(path, "is no key of DeepSpeed here", f"It belongs to {places}.")
    return DSProblem(path, "is no key of DeepSpeed", f"Known here: {', '.join(sorted(keys))}.")


def _places(
    key: str, keys: Mapping[str, Kind], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    for name, kind in keys.items():
        if name == key:
            yield (*path, name)
        if isinstance(kind, Mapping):
            yield from _places(key, kind, (*path, name))


def _hint(value: Any) -> str:
    if value == "auto":
        return "Leave the key out for DeepSpeed's default."
    return "Remove the quotes." if isinstance(value, str) and value in ("true", "false") else ""


def _broken_rule(value: Any, kind: Kind) -> str:
    """The rule that `value` breaks, as the end of "is …, not …"; empty if it is fine."""
    if isinstance(kind, tuple):
        fine = any(value == choice and type(value) is type(choice) for choice in kind)
        shown = [str(c) for c in kind if not (isinstance(c, str) and c.upper() == c != c.lower())]
        return "" if fine else "one of " + ", ".join(shown or map(str, kind))
    word = str(kind)
    if value is None:
        return "" if word.endswith("?") or word == "any" else _WORDS[word]
    word = word.rstrip("?")
    return "" if _fits(value, word) else _WORDS[word]


_WORDS = {
    "flag": "true or false", "int": "a whole number", "count": "a whole number of 0 or more",
    "positive": "a whole number above 0", "number": "a number",
    "nonnegative": "a number of 0 or more",
    "fraction": "a number between 0 and 1", "text": "text", "texts": "a list of text",
    "list": "a list",
    "map": "a section", "any": "a value",
}  # fmt: skip

_LIMITS = {"count": (0, None), "positive": (1, None), "nonnegative": (0, None), "fraction": (0, 1)}


def _fits(value: Any, word: str) -> bool:
    if word in ("int", "count", "positive", "number", "nonnegative", "fraction"):
        number = as_number(value)
        low, high = _LIMITS.get(word, (None, None))
        whole = word in ("int", "count", "positive")
        return (
            number is not None
            and (isinstance(number, int) or not whole)
            and (low is None or number >= low)
            and (high is None or number <= high)
        )
    if word == "texts":
        items = [value] if isinstance(value, str) else value
        return isinstance(items, list) and all(isinstance(item, str) for item in items)
    types = {"flag": bool, "text": str, "list": list, "map": Mapping}
    return word == "any" or isinstance(value, types[word])
