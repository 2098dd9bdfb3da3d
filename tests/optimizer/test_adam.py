"""Parameter groups, and the optimizers against AdamW written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from arctic_like.errors import RecipeError
from arctic_like.optimizer.adam import (
    AdamWConfig,
    AdamWFactory,
    CPUAdamConfig,
    CPUAdamFactory,
    FusedAdamConfig,
    FusedAdamFactory,
)
from arctic_like.optimizer.groups import parameter_groups


class Experts(nn.Module):
    """Stacked biases, as mixtures of experts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 3, 4))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(2, 4))


class Net(nn.Module):
    """An embedding, a matrix, a norm, a bias, experts; the head shares the embedding's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm((2, 2))  # two-dimensional, and still a norm
        self.experts = Experts()
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def names(net: nn.Module, groups: list[dict[str, Any]]) -> list[set[str]]:
    by_id = {id(p): name for name, p in net.named_parameters()}
    return [{by_id[id(p)] for p in group["params"]} for group in groups]


EXPECTED = [
    {"embed.weight", "linear.weight", "experts.gate_up_proj"},
    {"linear.bias", "norm.weight", "norm.bias", "experts.gate_up_proj_bias"},
]


def test_groups() -> None:
    net = Net()
    groups = parameter_groups(net, weight_decay=0.1)
    assert names(net, groups) == EXPECTED
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert sum(len(group["params"]) for group in groups) == 7  # the shared one once


def test_groups_are_the_same_when_zero3_leaves_empty_shards() -> None:
    net = Net()
    for parameter in net.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
    assert names(net, parameter_groups(net, weight_decay=0.1)) == EXPECTED


def test_no_empty_group() -> None:
    assert len(parameter_groups(nn.Linear(3, 3, bias=False), weight_decay=0.1)) == 1


def reference(net: Net, gradients: list[dict[str, torch.Tensor]], config: Any) -> dict[str, Any]:
    """Loshchilov and Hutter 2019, algorithm 2, in float64."""
    beta1, beta2 = config.betas
    result = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        w = parameter.detach().double().clone()
        decay = config.weight_decay if name in EXPECTED[0] else 0.0
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for t, gradient in enumerate(gradients, 1):
            g = gradient[name].double()
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + config.eps)
            w = w - config.learning_rate * (step + decay * w)
        result[name] = w
    return result


@pytest.mark.parametrize(
    ("factory", "config"),
    [
        (AdamWFactory, AdamWConfig(learning_rate=0.01, weight_decay=0.3, betas=(0.8, 0.95))),
        pytest.param(
            CPUAdamFactory,
            CPUAdamConfig(learning_rate=0.01, weight_decay=0.3, betas=(0.8, 0.95)),
            marks=pytest.mark.full,  # compiles DeepSpeed's kernel on first use: minutes
        ),
    ],
)
def test_updates(factory: Any, config: Any) -> None:
    torch.manual_seed(0)
    net = Net()
    gradients = [
        {name: torch.randn_like(p) for name, p in net.named_parameters()} for _ in range(4)
    ]
    expected = reference(net, gradients, config)
    optimizer = factory(config).build(model=net, device="cpu", offload=False)
    for gradient in gradients:
        for name, parameter in net.named_parameters():
            parameter.grad = gradient[name] if parameter.requires_grad else None
        optimizer.step()
    for name, parameter in net.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_adamw_gives_the_same_numbers_wherever_a_tensor_is_cut() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(1003), torch.randn(1003)

    def run(pieces: list[slice]) -> torch.Tensor:
        parts = nn.ParameterList([nn.Parameter(start[piece].clone()) for piece in pieces])
        optimizer = AdamWFactory(AdamWConfig()).build(model=parts, device="cpu", offload=False)
        for part, piece in zip(parts, pieces, strict=True):
            part.grad = gradient[piece].clone()
        optimizer.step()
        return torch.cat([part.detach() for part in parts])

    assert torch.equal(run([slice(0, 1003)]), run([slice(0, 335), slice(335, 1003)]))


@pytest.mark.parametrize(
    ("factory", "config", "device", "offload"),
    [
        (FusedAdamFactory, FusedAdamConfig(), "cpu", False),
        (FusedAdamFactory, FusedAdamConfig(), "cuda:0", True),
        (CPUAdamFactory, CPUAdamConfig(), "cuda:0", False),
    ],
)
def test_refused_where_it_cannot_run(factory: Any, config: Any, device: str, offload: bool) -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.type") as caught:
        factory(config).build(model=Net(), device=device, offload=offload)
    assert "adamw" in str(caught.value)


def test_config() -> None:
    assert AdamWConfig.model_validate({"lr": "1e-4"}).learning_rate == 1e-4
    for wrong in ({"betas": (0.9, 1.0)}, {"learning_rate": -1}, {"eps": 0}, {"momentum": 0.9}):
        with pytest.raises(ValidationError):
            AdamWConfig.model_validate(wrong)
