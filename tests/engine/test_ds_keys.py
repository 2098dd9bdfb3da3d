"""The table of DeepSpeed's keys against the installed DeepSpeed, and what a user is told."""

from __future__ import annotations

import enum
import typing
from typing import Any

import pytest

from arctic_like.engine import ds_keys
from arctic_like.engine.ds_keys import AUTO, KEYS, REMOVED, as_number, check_deepspeed, kind_of


def models() -> dict[str, type]:
    """DeepSpeed's pydantic models by the dotted path that they describe."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.tensor_parallel.config import TPConfig, TPTrainingConfig
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.zenflow": ZenFlowConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": precision_config.DeepSpeedBF16Config,
        "fp16": precision_config.DeepSpeedFP16Config,
        "hybrid_engine": HybridEngineConfig,
        "comms_logger": CommsLoggerConfig,
        "tensorboard": monitor.TensorBoardConfig,
        "csv_monitor": monitor.CSVConfig,
        "wandb": monitor.WandbConfig,
        "comet": monitor.CometConfig,
        "compile": CompileConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
        "tensor_parallel": TPTrainingConfig,
        "tensor_parallel.tp": TPConfig,
        "weight_quantization": WeightQuantConfig,
    }


def kinds_of(annotation: Any) -> set[str]:
    """The words of the table that a pydantic annotation allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {"choice"}
    if origin is typing.Union or type(annotation).__name__ == "UnionType":
        plain = [a for a in arguments if a is not type(None)]
        found = set().union(*(kinds_of(a) for a in plain))
        if len(plain) > 1:
            found = {"any"}
        return found | ({"?"} if type(None) in arguments else set())
    table = {
        bool: {"flag"},
        int: {"int", "count", "positive"},
        float: {"number", "nonnegative", "fraction"},
        str: {"text", "choice"},
        list: {"list", "texts"},
        tuple: {"list"},
        dict: {"map"},
        object: {"any"},
    }
    base = origin or annotation
    if base in table:
        return table[base]
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return {"choice"}
    if getattr(base, "__name__", "") == "Path":
        return {"text"}
    return {"section"} if hasattr(base, "model_fields") else {"any"}


@pytest.mark.parametrize("path", list(models()))
def test_sections_that_are_models_have_the_same_keys_and_types(path: str) -> None:
    model = models()[path]
    section = kind_of(tuple(path.split(".")))
    assert isinstance(section, dict)
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    assert set(section) == set(fields)
    for key, field in fields.items():
        kind, allowed = section[key], kinds_of(field.annotation)
        if isinstance(kind, dict):
            assert "section" in allowed, key
        elif isinstance(kind, tuple):
            assert "choice" in allowed, key
            if isinstance(field.annotation, type) and issubclass(field.annotation, enum.Enum):
                values = {member.value for member in field.annotation}
                assert set(kind) == values, key
        else:
            assert kind.rstrip("?") in allowed, (key, kind, allowed)
            assert kind.endswith("?") == ("?" in allowed), (key, kind)
            limits = {type(limit).__name__ for limit in field.metadata}
            assert (kind == "positive") == (limits == {"Gt"} and "int" in allowed), key
            assert (kind == "count") == (limits == {"Ge"} and "int" in allowed), key


class Asked(dict):
    """A dict that remembers which keys it was asked for, in sections below it as well."""

    def __init__(self, content: dict[str, Any]) -> None:
        below = {k: Asked(v) if isinstance(v, dict) else v for k, v in content.items()}
        super().__init__(below)
        self.seen: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        asked = self

        class Keys(list[str]):
            def __contains__(self, key: object) -> bool:
                return key in asked

        return Keys(super().keys())


def asked_for(content: dict[str, Any]) -> Asked:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = Asked({"train_batch_size": 1, **content})
    DeepSpeedConfig(config)
    return config


def test_every_key_that_deepspeed_asks_for_at_the_top_is_in_the_table_and_no_other() -> None:
    # These two it reads elsewhere, before and after its parser.
    elsewhere = {"sequence_parallel_size", "data_parallel_size"}
    gone = {path for path in REMOVED if "." not in path}
    assert asked_for({}).seen | elsewhere == set(KEYS) | gone


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("activation_checkpointing", {}),
        ("flops_profiler", {}),
        ("autotuning", {"model_info": {"profile": True}}),
        ("autotuning.model_info", {"model_info": {"profile": True}}),
        ("aio", {"block_size": 1048576}),
        ("checkpoint", {"tag_validation": "Warn"}),
        ("checkpoint.writer", {"writer": {"type": "PYTHON"}}),
        ("checkpoint.parallel_write", {"parallel_write": {"pipeline_stage": False}}),
        ("data_types", {}),
        ("data_efficiency", {"enabled": False}),
        ("data_efficiency.data_sampling", {"data_sampling": {"enabled": False}}),
        ("data_efficiency.data_routing", {"data_routing": {"enabled": False}}),
        ("torch_autocast", {"enabled": False, "dtype": "bf16"}),
        ("expert_parallel", {"enabled": False}),
        ("optimizer", {"type": "Adam", "params": {}}),
        ("scheduler", {"type": "WarmupLR", "params": {}}),
    ],
)
def test_sections_that_are_no_models_have_the_keys_that_deepspeed_asks_for(
    path: str, content: dict[str, Any]
) -> None:
    names = path.split(".")
    asked = asked_for({names[0]: content})
    for name in names:
        asked = dict.__getitem__(asked, name)
    section = kind_of(tuple(names))
    assert isinstance(section, dict)
    assert asked.seen == set(section)


def test_keys_that_deepspeed_removed_are_the_ones_we_name() -> None:
    from deepspeed.runtime import config

    zero = {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(REMOVED) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | zero


def test_communication_and_accumulation_dtypes_are_deepspeeds() -> None:
    from deepspeed.runtime.config import DtypeEnum, get_communication_data_type

    for name in ds_keys.COMMUNICATION:
        assert get_communication_data_type({"communication_data_type": name}) is not None
    for name in ds_keys.DTYPES:
        assert DtypeEnum(name).value is not None


def test_auto_paths_are_in_the_table() -> None:
    for path in AUTO:
        assert kind_of(tuple(path.split("."))) is not None, path


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation", "zero_optimization"),
        ({"gradient_cliping": 1.0}, "gradient_cliping", "gradient_clipping"),
        ({"zero_optimization": {"stge": 3}}, "zero_optimization.stge", "'stage'"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage", "one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage", "'three'"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage", "True"),
        ({"zero_optimization": True}, "zero_optimization", "section"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "zero_optimization.overlap_comm", "true"),
        ({"zero_optimization": {"sub_group_size": -1}}, "zero_optimization.sub_group_size", "-1"),
        ({"zero_optimization": {"reduce_bucket_size": 0}},
         "zero_optimization.reduce_bucket_size", "above 0"),
        ({"reduce_bucket_size": 1}, "reduce_bucket_size", "deepspeed.zero_optimization"),
        ({"gradient_clipping": "much"}, "gradient_clipping", "'much'"),
        ({"gradient_clipping": -1}, "gradient_clipping", "0 or more"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping", "nan"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled", "quotes"),
        ({"elasticity": {"enabled": True}}, "elasticity", "gone"),
        ({"checkpoint": {"writer": {"typ": "fast"}}}, "checkpoint.writer.typ", "'type'"),
        ({"zero_optimization": {"contiguous_gradients": "auto"}},
         "zero_optimization.contiguous_gradients", "Leave the key out"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_a_way_out(section: dict, path: str, words: str) -> None:
    (problem,) = check_deepspeed(section)
    assert ".".join(problem.path) == path
    assert words in f"{problem.message} {problem.hint}"


def test_all_problems_are_found_in_order() -> None:
    found = check_deepspeed({"bf16": {"enable": True}, "zzz": 1, "zero_optimization": {"stage": 9}})
    assert [".".join(p.path) for p in found] == ["bf16.enable", "zzz", "zero_optimization.stage"]


def test_a_transformers_configuration_with_auto_passes() -> None:
    # From transformers' DeepSpeed guide, without its optimizer and scheduler.
    section = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": "1e9",
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    assert check_deepspeed(section) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [("5e8", 500_000_000), (5e8, 500_000_000), ("1.5", 1.5), (7, 7), ("50M", 50_000_000),
     (True, None), ("x", None), (float("inf"), None), (None, None), ([1], None)],
)  # fmt: skip
def test_numbers_as_people_write_them(text: Any, number: Any) -> None:
    assert as_number(text) == number
    assert type(as_number(text)) is type(number)
