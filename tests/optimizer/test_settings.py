"""What the registered optimizers make of their settings: groups, formulas, packages that are not there."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from arctic_like.errors import RecipeError
from arctic_like.optimizer.packages import needed
from arctic_like.registry import build, lookup
from arctic_like.run_info import supply

from .test_registered import PACKAGES, SETTINGS, available


def made(kind: str, net: nn.Module, **settings: Any) -> Optimizer:
    """The optimizer that a recipe's map builds."""
    part = lookup("optimizer", kind)
    config = part.config_type.model_validate({"type": kind, **settings})
    found: Optimizer = supply(
        build(config, "optimizer").build, model=net, device="cpu", offload=False
    )
    return found


def test_paged_states_need_cuda() -> None:
    with pytest.raises(RecipeError, match="this run is on cpu"):
        made("paged_adamw_8bit", nn.Linear(2, 2))


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RecipeError, match=PACKAGES[kind]) as found:
        needed(PACKAGES[kind], optimizer=kind, extra="some")
    assert "arctic-like[some]" in str(found.value)


def test_muon_is_torchs_muon_for_matrices() -> None:
    """torch's own is an independent one: its iteration multiplies in another order, in bf16."""
    pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Linear(20, 6, bias=False))
    other = copy.deepcopy(net)
    ours = made("muon", net, lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(
        other.parameters(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    start = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for before, p, q in zip(start, net.parameters(), other.parameters(), strict=True):
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_lamb_is_its_formula() -> None:
    """You et al. 2020, version 3, in float64: r = m / (√v + ε) + λ w; w -= η min(|w|, 10) / |r| · r."""
    pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(1)
    net = nn.Linear(7, 5, bias=False).double()
    optimizer = made("lamb", net, lr=0.03, weight_decay=0.2, betas=[0.9, 0.99])
    w = net.weight.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for _ in range(3):
        gradient = torch.randn_like(w)
        net.weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        r = m / (v.sqrt() + 1e-6) + 0.2 * w
        w = w - 0.03 * min(float(w.norm()), 10.0) / (r.norm() + 1e-6) * r
        torch.testing.assert_close(net.weight.detach(), w)


def test_what_muon_leaves_to_adamw() -> None:
    pytest.importorskip("pytorch_optimizer")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(5, 4)
            self.layer = nn.Linear(4, 4)
            self.filters = nn.Conv2d(1, 2, 3, bias=False)
            self.experts = nn.Module()
            self.experts.stacked = nn.Parameter(torch.zeros(2, 4, 4))
            self.classifier = nn.Linear(4, 3)
            self.readout = nn.Linear(4, 2, bias=False)

    net = Model()
    names = {id(p): name for name, p in net.named_parameters()}
    for settings, moved in ({}, set()), ({"adamw_match": "readout"}, {"readout.weight"}):
        optimizer = made("muon", net, adamw_learning_rate=0.5, **settings)
        found: dict[bool, set[str]] = {True: set(), False: set()}
        for group in optimizer.param_groups:
            found[group["use_muon"]].update(names[id(p)] for p in group["params"])
            assert group["lr"] == (5e-4 if group["use_muon"] else 0.5)
        muon = {"layer.weight", "filters.weight", "readout.weight"}
        if moved:
            muon |= {"classifier.weight"}  # the pattern is another one
        assert found[True] == muon - moved


def test_lora_plus_holds_for_all_of_them() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Module()
            self.q_proj.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
            self.q_proj.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})

    seen = 0
    for kind in available(*SETTINGS):
        net = Adapted()
        optimizer = made(kind, net, lr=0.01, loraplus_lr_ratio=16)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[id(net.q_proj.lora_A["default"].weight)] == 0.01
        assert rates[id(net.q_proj.lora_B["default"].weight)] == 0.16
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()
        seen += 1
    assert seen >= 2
