"""Data sets of the Hub whose layout is known: the settings that a recipe need not state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYOUT = ("shape", "role_mapping", "content_key", "column")
"""Keys that say where things stand in a row: a recipe that states one of them states them all."""

_MESSAGES = {"shape": "messages"}

PRESETS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/ultrachat_200k": {
        **_MESSAGES, "split_mapping": {"train": "train_sft", "eval": "test_sft"},
    },
    "HuggingFaceH4/ultrafeedback_binarized": {
        "split_mapping": {"train": "train_prefs", "eval": "test_prefs"},
    },
    "Open-Orca/OpenOrca": {
        "role_mapping": {"system": "system_prompt", "user": "question", "assistant": "response"},
    },
    "Open-Orca/SlimOrca": {"shape": "sharegpt"},
    "meta-math/MetaMathQA": {"role_mapping": {"user": "query", "assistant": "response"}},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {
        "role_mapping": {"user": "problem", "assistant": "solution"},
    },
    "THUDM/LongAlign-10k": _MESSAGES,
    "zai-org/LongAlign-10k": _MESSAGES,
    "Yukang/LongAlpaca-12k": {"role_mapping": {"user": "instruction", "assistant": "output"}},
    "lmsys/lmsys-chat-1m": {"shape": "messages", "column": "conversation"},
    # its messages end with the question
    "nvidia/AceMath-Instruct-Training-Data": {
        "role_mapping": {"user": "messages.role.user", "assistant": "answer"},
    },
}  # fmt: skip
"""Name on the Hub → keys of a source."""


def with_preset(stated: Mapping[str, Any]) -> dict[str, Any]:
    """A source's map with what is known of its data set, as far as the map does not say it."""
    name = stated.get("name_or_path")
    bare = name.partition(":")[0] if isinstance(name, str) else ""
    known = PRESETS.get(bare, {})
    own_layout = any(stated.get(key) for key in LAYOUT)
    added = {
        key: value
        for key, value in known.items()
        if not stated.get(key) and not (own_layout and key in LAYOUT)
    }
    return {**stated, **added}
