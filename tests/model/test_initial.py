"""Initial weights: by name, with the model's own distributions, without touching the generators."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import normal_

from arctic_like.model.initial import initialise
from tests.model.shapes import GPT2, LLAMA, MAMBA, MIXTRAL, TIED, make


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "shape", [LLAMA, TIED, GPT2, MIXTRAL, MAMBA], ids=lambda s: s["model_type"]
)
def test_seed_and_name_alone_decide(shape: dict[str, Any]) -> None:
    torch.manual_seed(1)
    first = weights(make(shape, seed=5))
    torch.manual_seed(2)
    second = weights(make(shape, seed=5))
    other = weights(make(shape, seed=6))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_layer_more_changes_no_other_weight() -> None:
    small, large = weights(make(LLAMA)), weights(make({**LLAMA, "num_hidden_layers": 3}))
    assert small.keys() < large.keys()
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_layers_differ() -> None:
    found = weights(make(LLAMA))
    first = found["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(first, found["model.layers.1.self_attn.q_proj.weight"])
    assert not torch.equal(first, found["model.layers.0.self_attn.k_proj.weight"])


def test_bf16_is_the_rounding_of_fp32() -> None:
    exact, rounded = weights(make(LLAMA)), weights(make(LLAMA, dtype="bf16"))
    for name in exact:
        assert rounded[name].dtype == torch.bfloat16
        assert torch.equal(exact[name].bfloat16(), rounded[name])


def test_global_generators_are_untouched() -> None:
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    make(LLAMA)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize("shape", [LLAMA, GPT2, MIXTRAL], ids=lambda s: s["model_type"])
def test_distributions_are_those_of_transformers(shape: dict[str, Any]) -> None:
    """Same constants, and the same standard deviation where transformers draws."""
    big = {**shape, "initializer_range": 0.03}
    ours = make(big)
    theirs = AutoModelForCausalLM.from_config(ours.config, dtype=torch.float32)
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        if other.std() == 0:
            assert torch.equal(mine, other), name
        else:
            # Two samples of n: their standard deviations differ by sqrt(1/n) relative; 6 sigma.
            bound = 6 / math.sqrt(mine.numel())
            assert mine.std().item() == pytest.approx(other.std().item(), rel=bound), name
            assert abs(mine.mean()) < 6 * mine.std() / math.sqrt(mine.numel()), name


def test_gpt2_scales_residual_projections_by_depth() -> None:
    found = weights(make({**GPT2, "n_embd": 64}))
    deep = found["transformer.h.1.mlp.c_proj.weight"].std().item()
    assert deep == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert found["transformer.h.1.mlp.c_fc.weight"].std().item() == pytest.approx(0.02, rel=0.05)


def test_tied_weights_are_drawn_by_the_embedding() -> None:
    tied = make(TIED)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.model.embed_tokens.weight, make(LLAMA).model.embed_tokens.weight)


def test_rotary_tables_are_fp32_and_right() -> None:
    inverse = make(LLAMA, dtype="bf16").model.rotary_emb.inv_freq
    expected = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    assert inverse.dtype == torch.float32
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-6, atol=0)


class Partly(PreTrainedModel):
    """A model whose rule knows only some of its parameters."""

    config_class = PreTrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.known = nn.Linear(8, 8)
        self.unknown = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((4,), 7.0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.known:
            normal_(module.weight, std=5.0)


def test_what_the_rule_does_not_know_gets_torchs_default_by_name() -> None:
    torch.manual_seed(0)
    model = Partly(PreTrainedConfig())
    torch.manual_seed(99)
    again = Partly(PreTrainedConfig())
    initialise(model, seed=1)
    initialise(again, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert 2.5 < model.known.weight.std() < 10
    bound = 1 / math.sqrt(8)  # torch.nn.Linear: uniform in ±1/sqrt(fan_in), weight and bias
    for tensor in (model.unknown.weight, model.unknown.bias, model.known.bias):
        assert tensor.abs().max() <= bound
        assert tensor.std() > 0
    assert torch.equal(model.scale, torch.full((4,), 7.0))


def test_only_the_named_are_drawn() -> None:
    model = make(LLAMA)
    before = weights(model)
    initialise(model, seed=77, names=["lm_head.weight", "model.norm.weight"])
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"lm_head.weight"}  # the norm is one again
    assert torch.equal(after["lm_head.weight"], make(LLAMA, seed=77).lm_head.weight)
