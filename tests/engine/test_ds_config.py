"""The DeepSpeed dictionary: what is filled in, what is refused, and what DeepSpeed makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arctic_like.engine.ds_config import (
    Facts,
    deepspeed_config,
    deepspeed_problems,
    inexact,
    offloads_parameters,
    uses_offload,
    zero_stage,
)
from arctic_like.errors import RecipeError

PROBE = Path(__file__).with_name("ds_probe.py")


def config(section: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "dtype": "fp32",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "world_size": 3,
        "hidden_size": 2048,
        "on_cpu": True,
    }
    return deepspeed_config(section=section or {}, **{**known, **changes})


def problems(section: dict[str, Any], **changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        config(section, **changes)
    return [str(problem) for problem in caught.value.problems]


def test_what_the_recipe_states_is_filled_in() -> None:
    made = config()
    assert made["train_batch_size"] == 24
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 1.0
    assert made["zero_optimization"]["stage"] == 2
    assert "bf16" not in made
    assert "fp16" not in made


def test_what_the_section_states_wins_over_defaults_and_is_left_alone() -> None:
    section = {
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "5e6", "overlap_comm": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "communication_data_type": "bf16",
        "steps_per_print": 10,
        "prescale_gradients": True,
        "timers": {"throughput": {"enabled": True}},
    }
    before = json.dumps(section)
    made = config(section, dtype="bf16")
    assert json.dumps(section) == before
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"] == {
        "stage": 1, "reduce_bucket_size": 5_000_000, "overlap_comm": True
    }  # fmt: skip
    assert made["data_types"] == {"grad_accum_dtype": "bf16"}
    assert made["communication_data_type"] == "bf16"
    assert made["prescale_gradients"] is True
    assert made["timers"]["throughput"]["enabled"] is True


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_low_precision_sums_and_reduces_in_fp32_where_deepspeed_can(dtype: str, stage: int) -> None:
    made = config({"zero_optimization": {"stage": stage}}, dtype=dtype, on_cpu=False)
    assert made[dtype] == {"enabled": True}
    if stage:
        assert made["data_types"]["grad_accum_dtype"] == "fp32"
        assert made["communication_data_type"] == "fp32"
        assert inexact(made) == []
    else:
        assert "data_types" not in made
        assert len(inexact(made)) == 1


def test_bucket_sizes_follow_the_width_as_in_transformers() -> None:
    made = config({"zero_optimization": {"stage": 3}})["zero_optimization"]
    assert made["reduce_bucket_size"] == 2048 * 2048
    assert made["stage3_prefetch_bucket_size"] == int(0.9 * 2048 * 2048)
    assert made["stage3_param_persistence_threshold"] == 10 * 2048
    small = config({"zero_optimization": {"stage": 3}}, hidden_size=64)["zero_optimization"]
    assert small["reduce_bucket_size"] == small["stage3_prefetch_bucket_size"] == 2**20
    huge = config({}, hidden_size=10**6)["zero_optimization"]
    assert huge["reduce_bucket_size"] == 500_000_000
    assert config({}, hidden_size=None)["zero_optimization"] == {"stage": 2}
    assert "stage3_prefetch_bucket_size" not in config()["zero_optimization"]


def test_auto_is_as_if_not_given() -> None:
    section = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto",
            "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "auto"},
        },
    }
    made = config(section, dtype="bf16")
    plain = config({}, dtype="bf16")
    assert made.pop("fp16") == {}
    assert made["zero_optimization"].pop("offload_optimizer") == {}
    assert made == plain


def test_the_older_names_of_keys_are_understood() -> None:
    made = config({"bfloat16": {"enabled": True}}, dtype="bf16")
    assert made["bf16"] == {"enabled": True}
    assert "bfloat16" not in made
    old = {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}}
    made = config(old)
    assert uses_offload(made)
    assert offloads_parameters(made)
    assert "cpu_offload" not in made["zero_optimization"]


def test_stated_batch_sizes_that_agree_are_fine() -> None:
    section = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    assert config(section)["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ({"train_batch_size": 32}, {}, ["deepspeed.train_batch_size", "32", "micro_batch_size (4)",
                                        "gradient_accumulation_steps (2)", "ranks (3)", "24"]),
        ({"train_micro_batch_size_per_gpu": 8}, {},
         ["deepspeed.train_micro_batch_size_per_gpu", "8", "micro_batch_size is 4"]),
        ({"gradient_accumulation_steps": 1}, {}, ["gradient_accumulation_steps is 2"]),
        ({"bf16": {"enabled": True}}, {}, ["deepspeed.bf16.enabled", "model.dtype is fp32"]),
        ({"bfloat16": {"enabled": False}}, {"dtype": "bf16"}, ["false", "model.dtype is bf16"]),
        ({"fp16": {"enabled": True}}, {"dtype": "bf16"}, ["deepspeed.fp16.enabled"]),
        ({"data_types": {"param_dtype": "fp32"}}, {"dtype": "bf16"}, ["param_dtype", "bf16"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, {}, ["`optimizer:` at the top"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["`scheduler:` at the top"]),
        ({"gradient_allreduce_op": "sum"}, {}, ["deepspeed.gradient_allreduce_op", "'sum'"]),
        ({"managed_gradient_accumulation": False}, {}, ["managed_gradient_accumulation"]),
        ({"checkpoint": {"load_universal": True}}, {}, ["deepspeed.checkpoint.load_universal"]),
        ({"expert_parallel": {"autoep_size": 2}}, {}, ["not supported yet", "stage 3"]),
        ({"tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True}}, {},
         ["deepspeed.tensor_parallel.tp_overlap_comm", "autotp_size alone"]),
        ({"zero_optimization": {"stage": 5}}, {}, ["deepspeed.zero_optimization.stage", "5"]),
        ({"zero_optimization": {"stage": "three"}}, {}, ["'three'", "0, 1, 2, 3"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, {},
         ["offload_param", "stage 3", "stage is 2"]),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, {}, ["stage is 2"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {},
         ["offload_optimizer", "stage 1 or higher"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, {},
         ["nvme_path"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, {},
         ["ratio", "stage 3"]),
        ({"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "fp32"}},
         {"dtype": "bf16"}, ["grad_accum_dtype", "stage 0", "stage 1, 2 or 3"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, {}, ["compute_grad_norm"]),
        ({"zero_optimization": {"allgather_bucket_size": 7}}, {}, ["even"]),
        ({}, {"dtype": "fp16"}, ["model.dtype", "fp16", "CPU", "bf16"]),
        ({"gradient_cliping": 1}, {}, ["deepspeed.gradient_cliping", "gradient_clipping"]),
    ],
)  # fmt: skip
def test_contradictions_name_both_places(
    section: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    (text,) = problems(section, **changes)
    for word in words:
        assert word in text


def test_all_contradictions_are_found_at_once() -> None:
    section = {"train_batch_size": 1, "optimizer": {"type": "x"}, "bf16": {"enabled": True}}
    assert len(problems(section)) == 3


def test_fp16_is_fine_on_a_gpu() -> None:
    assert config({}, dtype="fp16", on_cpu=False)["fp16"] == {"enabled": True}


def test_what_is_not_known_yet_is_not_complained_about() -> None:
    section = {"train_batch_size": 32, "bf16": {"enabled": True}}
    assert deepspeed_problems(section, facts=Facts()) == []
    assert len(deepspeed_problems(section, facts=Facts(dtype="fp32"))) == 1
    known = Facts("bf16", micro_batch_size=4, gradient_accumulation_steps=2, world_size=1)
    assert len(deepspeed_problems(section, facts=known)) == 1


def test_stage_and_offload_are_read_from_sections_and_from_dictionaries() -> None:
    assert zero_stage({}) == zero_stage({"zero_optimization": {"stage": "auto"}}) == 2
    assert zero_stage(config({"zero_optimization": {"stage": 3}})) == 3
    assert not uses_offload({})
    assert not uses_offload(config({"zero_optimization": {"offload_optimizer": None}}))
    assert uses_offload({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "bfloat16"}}, "summed in bfloat16"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "quantised"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16 precision"),
        ({"torch_autocast": {"enabled": True, "dtype": "bf16"}}, "torch_autocast"),
    ],
)
def test_what_is_less_exact_is_said(section: dict[str, Any], words: str) -> None:
    (sentence,) = inexact(config(section, dtype="bf16"))
    assert words in sentence


def test_it_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, arctic_like.engine.ds_config; "
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


STAGES = [(dtype, f"stage {stage}") for dtype in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
SECTIONS: dict[str, dict[str, Any]] = {
    **{f"stage {stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    "stage 2, offload": {"stage": 2, **OFFLOAD},
    "stage 3, offload": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
}
CASES = [*STAGES, ("bf16", "stage 2, offload"), ("bf16", "stage 3, offload")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What `ds_probe.py` found on two ranks, by case."""
    out = tmp_path_factory.mktemp("probe") / "out.json"
    jobs = [
        {"dtype": dtype, "section": {"zero_optimization": SECTIONS[name]}} for dtype, name in CASES
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PROBE": json.dumps(jobs)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(PROBE), str(out)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(out.read_text()), strict=True))


@pytest.mark.parametrize(("dtype", "name"), CASES)
def test_two_ranks_apply_the_exact_gradient(
    measured: dict[tuple[str, str], dict[str, Any]], dtype: str, name: str
) -> None:
    # The reference is the float64 sum of the same micro-batches' gradients by plain torch.
    record = measured[dtype, name]
    limit = 5e-3 if (dtype, name) == ("bf16", "stage 0") else 2e-6
    assert record["gradient_error"] < limit
    assert record["read"]["gradient_clipping"] == 0.0
    assert record["read"]["steps_per_print"] is None
    assert record["read"]["zero_stage"] == SECTIONS[name]["stage"]
