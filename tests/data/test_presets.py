"""Data sets that are known by name: rows as they lie on the Hub, without anything in the recipe."""

from __future__ import annotations

from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.data.base import SourceConfig
from arctic_like.data.presets import PRESETS
from arctic_like.data.shapes import conversation, pair
from arctic_like.data.splits import named_part

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "be"}
MORE = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]

ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "q", "prompt_id": "f0e3", "messages": [
            {"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}, *MORE]},
        [Q, A, *MORE],
    ),
    "Open-Orca/OpenOrca": (
        {"id": "niv.1", "system_prompt": "be", "question": "q", "response": "a"}, [SYSTEM, Q, A],
    ),
    "Open-Orca/SlimOrca": (
        {"conversations": [
            {"from": "system", "value": "be", "weight": None},
            {"from": "human", "value": "q", "weight": 0.0},
            {"from": "gpt", "value": "a", "weight": 1.0}]},
        [SYSTEM, Q, {**A, "train": True}],
    ),
    "meta-math/MetaMathQA": (
        {"type": "MATH_AnsAug", "query": "q", "original_question": "o", "response": "a"}, [Q, A],
    ),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": (
        {"lang": "python", "raw_index": 1, "index": 2, "seed": "s", "openai_fingerprint": "f",
         "problem": "q", "solution": "a"}, [Q, A],
    ),
    "THUDM/LongAlign-10k": ({"messages": [Q, A], "length": 9}, [Q, A]),
    "zai-org/LongAlign-10k": ({"messages": [Q, A], "length": 9}, [Q, A]),
    "Yukang/LongAlpaca-12k": (
        {"instruction": "q", "output": "a", "input": "", "file": "f"}, [Q, A],
    ),
    "lmsys/lmsys-chat-1m": (
        {"conversation_id": "c", "model": "m", "conversation": [Q, A, *MORE], "turn": 2,
         "language": "English", "openai_moderation": [], "redacted": False}, [Q, A, *MORE],
    ),
    "nvidia/AceMath-Instruct-Training-Data": (
        {"messages": [Q, A, MORE[0]], "answer": "b"}, [Q, A, *MORE],
    ),
}  # fmt: skip
FEEDBACK = {
    "prompt": "q", "prompt_id": "p", "chosen": [Q, A], "rejected": [Q, MORE[1]], "messages": [Q, A],
    "score_chosen": 8.0, "score_rejected": 2.0,
}  # fmt: skip


def source(**more: Any) -> SourceConfig:
    return SourceConfig.model_validate(more)


def test_every_preset_has_its_row() -> None:
    assert {*ROWS, "HuggingFaceH4/ultrafeedback_binarized"} == PRESETS.keys()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("more", ["", ":train", ":train[:100]", ":math_sft[:10%]"])
def test_rows_as_they_lie_on_the_hub(name: str, more: str) -> None:
    row, messages = ROWS[name]
    assert conversation(row, source(name_or_path=name + more)) == messages
    instruct = source(type="huggingface_instruct", name_or_path=name + more)
    assert conversation(row, instruct) == messages


def test_an_empty_system_prompt_is_none() -> None:
    row = {**ROWS["Open-Orca/OpenOrca"][0], "system_prompt": ""}
    assert conversation(row, source(name_or_path="Open-Orca/OpenOrca")) == [Q, A]


def test_preferences() -> None:
    config = source(name_or_path="HuggingFaceH4/ultrafeedback_binarized")
    found = pair(FEEDBACK, config)
    assert (found.prompt, found.chosen, found.rejected) == ([Q], [A], [MORE[1]])
    assert conversation(FEEDBACK, config) == [Q, A]


@pytest.mark.parametrize(
    ("name", "split", "named"),
    [
        ("HuggingFaceH4/ultrachat_200k", "", "train_sft"),
        ("HuggingFaceH4/ultrachat_200k:train[:10]", "", "train_sft"),
        ("HuggingFaceH4/ultrachat_200k", "eval", "test_sft"),
        ("HuggingFaceH4/ultrachat_200k", "train_gen", "train_gen"),
        ("HuggingFaceH4/ultrafeedback_binarized", "eval", "test_prefs"),
        ("meta-math/MetaMathQA", "train", "train"),
    ],
)
def test_splits(name: str, split: str, named: str) -> None:
    assert named_part(source(name_or_path=name, split=split))[1].split == named


def test_the_recipe_goes_before_the_preset() -> None:
    mapping = {"user": "original_question", "assistant": "response"}
    config = source(name_or_path="meta-math/MetaMathQA", role_mapping=mapping)
    assert config.role_mapping == mapping
    other = source(name_or_path="lmsys/lmsys-chat-1m", role_mapping=mapping)
    assert (other.column, other.shape) == ("", "auto"), "half of a layout makes none"
    kept = source(name_or_path="HuggingFaceH4/ultrachat_200k", split_mapping={"train": "train_gen"})
    assert kept.split_mapping == {"train": "train_gen"}
    assert kept.shape == "messages"
    moved = config.replace(name_or_path="meta-math/MetaMathQA", split="eval")
    assert (moved.role_mapping, moved.split) == (mapping, "eval")


def test_bare_strings_in_a_recipe() -> None:
    names = [f"{name}:train[:9]" for name in ROWS]
    recipe = load_recipe({"model": {"name_or_path": "none"}, "data": {"sources": names}})
    for config, (row, messages) in zip(recipe.config.data.sources, ROWS.values(), strict=True):  # type: ignore[attr-defined]
        assert conversation(row, config) == messages
    # what is saved with a run is what the recipe says
    assert "role_mapping" not in recipe.dump()
