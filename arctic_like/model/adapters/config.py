"""What a recipe says of an adapter, checked against peft's own keys without importing peft.

peft_config: {type: lora, r: 16, lora_alpha: 32, target_modules: all-linear}

peft imports torch and transformers, which takes seconds; the keys of its config classes are read from its
source files instead, so that `arctic-train validate` finds a typo at once.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.config.base import wrong
from arctic_like.model.adapters.tasks import CAUSAL

if TYPE_CHECKING:
    from arctic_like.model.huggingface import HFModelConfig

KINDS = {
    "LORA": ("lora", "LoraConfig"),
    "OFT": ("oft", "OFTConfig"),
    "IA3": ("ia3", "IA3Config"),
    "PROMPT_TUNING": ("prompt_tuning", "PromptTuningConfig"),
    "PREFIX_TUNING": ("prefix_tuning", "PrefixTuningConfig"),
}
"""peft's type → its package below `peft.tuners` and its config class."""

PROMPTS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING"})
"""Types that put virtual tokens in front of a row, which isolated documents in it would not see alike."""

_OURS = {
    "base_model_name_or_path": "model.name_or_path says it",
    "revision": "model.revision says it",
    "inference_mode": "adapters are trained here",
    "auto_mapping": "it follows from the model",
    "peft_version": "it is the installed one",
}
"""peft's keys that follow from the rest of the recipe → why."""

_NEED_DATA = ("eva", "corda", "lora_ga")
"""Values of `init_lora_weights` that need a pass over data before there is an adapter."""


def kind_of(config: Mapping[str, Any]) -> str:
    """peft's name of the adapter's type, such as LORA; empty where none is stated."""
    stated = config.get("type", config.get("peft_type", ""))
    return str(getattr(stated, "value", stated) or "").upper().replace("-", "_")


def arguments(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The arguments for peft's config class: all keys but the type, for peft's type of task."""
    own = {key: value for key, value in config.items() if key not in ("type", "peft_type")}
    return {**own, "task_type": task}


def check(config: Mapping[str, Any], *, tasks: Sequence[str]) -> None:
    """Raise the validation error that names the key, for what no adapter can be made of. tasks: peft's
    types that the model's kind may have."""
    if "type" in config and "peft_type" in config:
        raise wrong("and type are the same key", place="peft_type", hint="keep type")
    kind = kind_of(config)
    spelled = "peft_type" if "peft_type" in config else "type"
    known_kinds = ", ".join(name.lower() for name in KINDS)
    if not kind:
        raise wrong("is needed", place=spelled, hint=f"write type: lora; there are {known_kinds}")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise wrong(
            f"is {config[spelled]!r}, not a type of adapter that can be trained here",
            place=spelled,
            hint=f"did you mean {near[0].lower()!r}?" if near else f"there are {known_kinds}",
        )
    known = keys_of(kind)
    for key in config:
        if key in _OURS:
            raise wrong("does not belong here", place=key, hint=f"remove it: {_OURS[key]}")
        if known is not None and key not in known | {"type"}:
            near = difflib.get_close_matches(key, known, n=1)
            raise wrong(
                f"is no key of peft's {KINDS[kind][1]}",
                place=key,
                hint=f"did you mean {near[0]!r}?"
                if near
                else f"there are {', '.join(sorted(known))}",
            )
    _check_values(config, tasks)


def check_model(model: HFModelConfig) -> None:
    """Raise the validation error for keys of `model:` that contradict its adapter, or want one."""
    if model.peft_config is not None and model.adapter is not None:
        raise wrong("and peft_config are both given", place="adapter",
                    hint="keep one: the folder has a config of its own; for a new adapter on top of that "
                    "one, `arctic-train merge` it and name the result as the base")  # fmt: skip
    if not model.adapted:
        for key in ("quantization", "adapter_dtype"):
            if getattr(model, key) is not None:
                raise wrong("is for an adapter, and there is none", place=key,
                            hint="add peft_config: {type: lora, …}")  # fmt: skip
        return
    if model.weights_from is not None:
        raise wrong(
            "would change the base that the adapter belongs to",
            place="weights_from",
            hint="`arctic-train export` them to a folder, and set name_or_path to it",
        )
    if model.quantization and model.config is not None:
        raise wrong("needs a pretrained model", place="quantization", hint="set name_or_path")
    if model.adapter_dtype not in (None, "fp32", model.dtype):
        raise wrong(f"is {model.adapter_dtype!r} over a base in {model.dtype}",
                    place="adapter_dtype", hint="leave it out, or write fp32")  # fmt: skip
    if model.adapter_task != CAUSAL:
        _check_task(model)
    how = model.activation_checkpointing
    if model.keeps_activations and model.given("activation_checkpointing") and how != "none":
        raise wrong(f"is {how}, and prefix tuning cannot compute activations again",
                    place="activation_checkpointing", hint="set it to none")  # fmt: skip
    again = "disable_activation_checkpoint"
    if model.keeps_activations and model.given(again) and not getattr(model, again):
        raise wrong("is false, and prefix tuning cannot compute activations again", place=again,
                    hint="set it to true")  # fmt: skip


def _check_task(model: HFModelConfig) -> None:
    kind = kind_of(model.peft_config or {})
    if kind in PROMPTS:
        raise wrong(
            f"is {kind.lower()}, whose virtual tokens stand before the texts that are scored",
            place="peft_config.type",
            hint="take lora, oft or ia3",
        )
    if model.quantization:
        raise wrong("is for language models: a head is not trained over a base in so few bits",
                    place="quantization", hint="leave it out")  # fmt: skip


def _check_values(config: Mapping[str, Any], tasks: Sequence[str]) -> None:
    task = config.get("task_type", tasks[0])
    if task not in tasks:
        raise wrong(f"is {task!r}; this model's is {' or '.join(tasks)}", place="task_type",
                    hint="remove it: the model says it")  # fmt: skip
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_NEED_DATA):
        raise wrong(
            f"is {start!r}, which needs a pass over data before the adapter is made",
            place="init_lora_weights",
            hint="take true, gaussian, orthogonal, olora, pissa or pissa_niter_16",
        )


@functools.cache
def keys_of(kind: str) -> frozenset[str] | None:
    """The fields of peft's config class of a type, with those it inherits; None without peft."""
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        return None
    root = Path(found.origin).parent
    package, name = KINDS[kind]
    classes: dict[str, ast.ClassDef] = {}
    for path in (root / "config.py", root / "tuners" / package / "config.py"):
        try:
            tree = ast.parse(path.read_text())
        except (OSError, SyntaxError):
            return None
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    keys: set[str] = set()
    waiting = [name]
    while waiting:
        node = classes.get(waiting.pop())
        if node is None:
            continue
        keys |= {
            field.target.id
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        }
        waiting += [base.id for base in node.bases if isinstance(base, ast.Name)]
    return frozenset(keys) or None
