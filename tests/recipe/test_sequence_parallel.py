"""What `sequence_parallel_size` cannot be combined with is refused by name at validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from arctic_like import load_recipe
from arctic_like.registry import lookup
from arctic_like.trainer.sequence import shares_sequences
from arctic_like.trainer.sft import SFTTrainer

from .refusals import refusal

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    """A recipe that shares rows among two ranks."""
    (tmp_path / "rows.jsonl").write_text("")
    return {
        "model": {"config": LLAMA}, "tokenizer": {"type": "byte"}, "sequence_parallel_size": 2,
        "data": {"sources": [str(tmp_path / "rows.jsonl")], "pack_samples": False},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "reward", "data": {"type": "dpo", "sources": ["x.jsonl"]}}, ["'reward'"]),
        ({"type": "embedding", "data": {"type": "embedding", "sources": ["x.jsonl"]}},
         ["'embedding'"]),
        ({"model": {"config": {**LLAMA, "num_attention_heads": 5}}},
         ["model", "5 attention heads", "2 ranks"]),
        ({"model": {"config": {"model_type": "mamba"}}}, ["mamba", "state"]),
        ({"model": {"config": {"model_type": "bloom"}}}, ["bloom", "mask"]),
        ({"model": {"config": {"model_type": "lfm2"}}}, ["lfm2", "convolutions"]),
        ({"model": {"config": LLAMA, "attn_implementation": "flex_attention"}},
         ["model.attn_implementation", "flex_attention", "sdpa"]),
        ({"model": {"config": LLAMA, "peft_config": {"type": "prompt_tuning",
                                                     "num_virtual_tokens": 4}}},
         ["model.peft_config", "virtual tokens"]),
        ({"callbacks": [{"type": "neftune"}]}, ["callbacks.0", "whole rows"]),
        ({"type": "dpo", "data": {"type": "dpo", "sources": ["x.jsonl"]},
          "ref_model": {"config": {**LLAMA, "num_attention_heads": 1}}},
         ["ref_model", "1 attention heads"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_it_is_refused(base: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    text = refusal({**base, **changes})
    assert "sequence_parallel_size" in text
    for word in words:
        assert word in text


def test_the_same_recipes_are_valid_without_it(base: dict[str, Any]) -> None:
    assert load_recipe(base).config.sequence_parallel_size == 2
    odd = {**base, "model": {"config": {**LLAMA, "num_attention_heads": 5}}}
    assert load_recipe({**odd, "sequence_parallel_size": 1}).config.sequence_parallel_size == 1
    assert load_recipe({**odd, "sequence_parallel_size": 5}).config.sequence_parallel_size == 5


@pytest.mark.parametrize(
    ("name", "shares"),
    [*((name, True) for name in ("sft", "causal", "dpo", "orpo", "simpo", "cpo", "kto")),
     *((name, False) for name in ("reward", "process_reward", "distill", "embedding", "gan",
                                  "classification", "supervised"))],
)  # fmt: skip
def test_who_shares_rows(name: str, shares: bool) -> None:
    assert shares_sequences(lookup("trainer", name)) is shares


def test_a_trainer_that_overrides_the_loss_says_so_itself() -> None:
    class Named(SFTTrainer):
        """Nothing of its own."""

    class Silent(SFTTrainer):
        def loss(self, batch: Any) -> Any:
            """Of whole rows, perhaps."""
            return super().loss(batch)

    class Saying(Silent):
        shares_sequences: ClassVar[bool] = True

    class Later(Saying):
        def weight(self, batch: Any) -> float:
            """Something else."""
            return 1.0

    found = [shares_sequences(kind) for kind in (Named, Silent, Saying, Later)]
    assert found == [True, False, True, False]
