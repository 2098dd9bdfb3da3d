"""Which models keep packed documents apart: the names against the proof, the proof against logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arctic_like.errors import RecipeError
from arctic_like.model.huggingface import HFModelConfig
from arctic_like.model.isolation import (
    cannot_isolate,
    check_isolation,
    described,
    packed_inputs,
    packing_refusal,
)
from tests.model.shapes import GPT2, LLAMA, MAMBA, MIXTRAL, make

LFM2 = {
    "model_type": "lfm2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [LLAMA, GPT2, MIXTRAL], ids=lambda s: s["model_type"])
def test_attention_isolates(shape: dict[str, Any], dtype: str) -> None:
    assert cannot_isolate(shape["model_type"], shape) is None
    check_isolation(make(shape, dtype=dtype), vocab_size=262, device="cpu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (MAMBA, "fp32"),
        (MAMBA, "bf16"),
        (FALCON, "fp32"),
        (FALCON, "bf16"),
        ({**LFM2, "layer_types": ["conv", "full_attention"]}, "fp32"),
    ],
)
def test_named_models_do_not(shape: dict[str, Any], dtype: str) -> None:
    assert cannot_isolate(shape["model_type"], shape)
    with pytest.raises(RecipeError, match=rf"data\.pack_samples.*{shape['model_type']}"):
        check_isolation(make(shape, dtype=dtype), vocab_size=262, device="cpu")


def test_a_hybrid_of_attention_layers_alone_isolates() -> None:
    shape = {**LFM2, "layer_types": ["full_attention", "full_attention"]}
    assert cannot_isolate("lfm2", shape) is None
    check_isolation(make(shape), vocab_size=262, device="cpu")
    assert cannot_isolate("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]})


def test_what_is_proved_is_what_matters() -> None:
    """A packed row gives each document the logits that it has alone (float32, plain transformers)."""
    model = make(LLAMA, disable_activation_checkpoint=True).eval()
    first, second = torch.arange(7)[None] + 3, torch.arange(5)[None] + 40
    ids = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(**packed_inputs(model, ids, positions)).logits
        alone = [model(document, use_cache=False).logits for document in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)


def test_nothing_is_left_changed() -> None:
    model = make({**LLAMA, "attention_dropout": 0.5})
    model.model.norm.eval()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    check_isolation(model, vocab_size=262, device="cpu", rows=1)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.model.layers[0].training
    assert not model.model.norm.training


def test_flash_gets_its_rows_end_to_end() -> None:
    model = make(LLAMA)
    ids = torch.arange(6).view(2, 3)
    assert packed_inputs(model, ids, ids)["input_ids"].shape == (2, 3)
    model.config._attn_implementation_internal = "flash_attention_2"
    inputs = packed_inputs(model, ids, ids)
    assert inputs["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert inputs["use_cache"] is False
    assert "attention_mask" not in inputs


def test_arguments_that_a_model_does_not_take_are_left_out() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    ids = torch.zeros(1, 2, dtype=torch.int64)
    assert set(packed_inputs(Plain(), ids, ids)) == {"input_ids"}


def test_refusal_of_a_recipe() -> None:
    assert packing_refusal(HFModelConfig(config=LLAMA)) is None
    assert packing_refusal(HFModelConfig(name_or_path="some/hub-name")) is None
    assert "state-space" in str(packing_refusal(HFModelConfig(config=MAMBA)))


def test_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert described(HFModelConfig(name_or_path=str(tmp_path)))["model_type"] == "mamba"
    assert described(HFModelConfig(config=LLAMA)) == LLAMA
    assert described(HFModelConfig(name_or_path="some/hub-name")) == {}
