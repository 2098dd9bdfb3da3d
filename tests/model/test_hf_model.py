"""The `huggingface` factory: what it builds, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from arctic_like.errors import RecipeError
from arctic_like.model.huggingface import HFModelConfig, HFModelFactory
from arctic_like.model.liger import LigerModelConfig, LigerModelFactory
from arctic_like.world import World
from tests.model.shapes import GPT2, LLAMA, TIED, byte_tokenizer, make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model that plain transformers wrote."""
    path = tmp_path_factory.mktemp("pretrained")
    make(LLAMA, seed=11).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_config_gets_the_tokenizers_facts() -> None:
    tokenizer = byte_tokenizer()
    model = make(LLAMA)
    assert model.config.vocab_size == len(tokenizer) == 262
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert make({**LLAMA, "vocab_size": 512}).config.vocab_size == 512


@pytest.mark.parametrize(
    "shape", [LLAMA, {**LLAMA, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 4}]
)
def test_a_padding_token_that_ends_documents_too_is_trained(shape: dict[str, Any]) -> None:
    """nn.Embedding gives its padding_idx no gradient; gemma's own default would be token 0."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = make(shape, tokenizer=tokenizer, disable_activation_checkpoint=True)
    ids = torch.tensor([[0, tokenizer.eos_token_id, 5]])
    model(ids).logits.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert (gradient[ids[0]].abs().sum(-1) > 0).all()
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


def test_ready_to_train() -> None:
    model = make(LLAMA)
    assert model.training
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is True
    assert model.model.gradient_checkpointing is True
    assert make(LLAMA, disable_activation_checkpoint=True).model.gradient_checkpointing is False
    assert model.dtype == torch.float32
    assert make(LLAMA, dtype="bf16").dtype == torch.bfloat16
    assert HFModelConfig(config=LLAMA).dtype == "bf16"


def test_activation_checkpointing_changes_no_gradient() -> None:
    ids = torch.arange(12).view(2, 6)
    gradients = []
    for disable in (True, False):
        model = make({**GPT2, "resid_pdrop": 0.2}, disable_activation_checkpoint=disable)
        torch.manual_seed(0)
        model(ids, use_cache=False).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_pretrained(folder: Path) -> None:
    expected = make(LLAMA, seed=11)
    model = make(name_or_path=str(folder), seed=3)
    for (name, a), (_, b) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    facts = HFModelFactory(HFModelConfig(name_or_path=str(folder))).facts()
    assert (facts.model_type, facts.vocab_size, facts.hidden_size) == ("llama", 262, 32)
    assert (facts.max_positions, facts.num_layers) == (2048, 2)


def test_weights_that_a_checkpoint_lacks_are_drawn_by_name(tmp_path: Path) -> None:
    whole = make(LLAMA, seed=11)
    whole.model.save_pretrained(tmp_path)  # without the head
    model = make(name_or_path=str(tmp_path), seed=4)
    assert torch.equal(model.lm_head.weight, make(LLAMA, seed=4).lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, whole.model.embed_tokens.weight)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    make(TIED, seed=11).save_pretrained(tmp_path)
    model = make(name_or_path=str(tmp_path), seed=4)
    assert torch.equal(model.lm_head.weight, make(TIED, seed=11).lm_head.weight)


def test_config_values_can_be_replaced(folder: Path) -> None:
    model = make(name_or_path=str(folder), hf_config_kwargs={"attention_dropout": 0.25})
    assert model.config.attention_dropout == 0.25


def test_facts_of_random_weights() -> None:
    facts = HFModelFactory(HFModelConfig(config=GPT2)).facts()
    assert (facts.max_positions, facts.vocab_size, facts.hidden_size) == (64, None, 32)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"config": {**LLAMA, "hidden_sise": 3}}, "did you mean 'hidden_size'"),
        ({"config": {**LLAMA, "model_type": "lama"}}, "did you mean 'llama'"),
        ({"config": {**LLAMA, "hidden_size": 33}}, "33"),
        ({"config": {**LLAMA, "hidden_size": "wide"}}, "hidden_size"),
        ({"config": {**LLAMA, "vocab_size": 100}}, r"\(100\).*\(262 tokens\)"),
        ({"config": LLAMA, "hf_config_kwargs": {"atention_dropout": 1}}, "attention_dropout"),
        ({"config": LLAMA, "attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"config": LLAMA, "attn_implementation": "spda"}, "attn_implementation"),
        ({"name_or_path": "/no/such/folder"}, "name_or_path"),
    ],
)
def test_refused(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        make(**({"shape": config.pop("config")} if "config" in config else {}), **config)


def test_liger_says_what_it_needs() -> None:
    factory = LigerModelFactory(LigerModelConfig(config=LLAMA))
    arguments = {"tokenizer": byte_tokenizer(), "seed": 0, "zero_stage": 0, "ds_config": {}}
    with pytest.raises(RecipeError, match="needs a CUDA device"):
        factory.build(world=World(), device="cpu", **arguments)
    with pytest.raises(RecipeError, match="pip install liger-kernel"):
        factory.build(world=World(device="cuda:0"), device="cuda:0", **arguments)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"config": {"hidden_size": 32}},
        {"config": LLAMA, "name_or_path": "x"},
        {"config": LLAMA, "dtype": "int8"},
        {"config": LLAMA, "nam_or_path": "x"},
    ],
)
def test_invalid(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HFModelConfig.model_validate(config)
