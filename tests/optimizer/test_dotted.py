"""Optimizers by their dotted path: against a bare torch loop, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from arctic_like.errors import RecipeError
from arctic_like.optimizer.dotted import DottedOptimizerConfig, DottedOptimizerFactory
from arctic_like.optimizer.limits import ELEMENTWISE, check_optimizer, has_modes, untested

from .test_adam import EXPECTED, Net

HERE = __name__


class Plain(torch.optim.Optimizer):
    """Gradient descent that knows no weight decay, and a setting that no group may have."""

    def __init__(self, params: Any, lr: float = 0.1, scale: float = 1.0) -> None:
        self.scale = scale
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"] * self.scale)


class Rateless(torch.optim.Optimizer):
    """Has no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


class Modes(Plain):
    """As schedule-free ones have them."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class NoOptimizer:
    """Something else."""


def build(net: nn.Module, kind: str, **stated: Any) -> torch.optim.Optimizer:
    config = DottedOptimizerConfig.model_validate({"type": kind, **stated})
    return DottedOptimizerFactory(config).build(model=net)


STATED: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.1},
    "RMSprop": {"lr": "1e-2", "alpha": "90%", "centered": True},
    "NAdam": {"lr": 0.01, "momentum_decay": "4e-3"},
    "RAdam": {},
    "Adamax": {"lr": 0.01},
    "Adadelta": {"lr": 1.0, "rho": 0.8},
    "Rprop": {"lr": 0.01, "etas": [0.4, 1.1]},
    "ASGD": {"lr": 0.01, "lambd": "1e-3"},
    "Adagrad": {"lr": 0.01},
}


@pytest.mark.parametrize("name", STATED)
def test_it_updates_as_the_class_itself_does(name: str) -> None:
    """Decay reaches matrices and embeddings alone; everything else is the class's own business."""
    torch.manual_seed(0)
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    optimizer = build(one, f"torch.optim.{name}", **STATED[name])
    plain = {"1e-2": 0.01, "90%": 0.9, "4e-3": 4e-3, "1e-3": 1e-3}
    given = {k: plain.get(v, v) if isinstance(v, str) else v for k, v in STATED[name].items()}
    cls = getattr(torch.optim, name)
    decayed = [p for n, p in other.named_parameters() if n in EXPECTED[0]]
    spared = [p for n, p in other.named_parameters() if n in EXPECTED[1]]
    bare = cls([{"params": decayed}, {"params": spared, "weight_decay": 0.0}], **given)
    for _ in range(5):
        gradients = {n: torch.randn_like(p) for n, p in one.named_parameters()}
        for net in (one, other):
            for n, p in net.named_parameters():
                p.grad = gradients[n].clone() if p.requires_grad else None
        optimizer.step()
        bare.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_groups_take_any_argument_of_the_class() -> None:
    optimizer = build(
        Net(), "torch.optim.SGD", lr=0.1, momentum=0.9,
        groups=[{"match": "embed", "lr": 0.01, "momentum": "50%"}, {"match": "norm"}],
    )  # fmt: skip
    found = [(g["group_name"], g["lr"], g["momentum"]) for g in optimizer.param_groups]
    assert found == [("", 0.1, 0.9)] * 2 + [("embed", 0.01, 0.5), ("norm", 0.1, 0.9)]


def test_a_class_without_weight_decay_gets_none() -> None:
    optimizer = build(Net(), f"{HERE}.Plain", groups=[{"match": "embed", "lr": 1}])
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1]
    assert all("weight_decay" not in group for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["lr"] == 0.1  # the class's own default


@pytest.mark.parametrize(
    ("kind", "stated", "place", "sentence"),
    [
        ("torch.optim.SGD", {"momentun": 0.9}, "optimizer.momentun", "did you mean 'momentum'"),
        ("torch.optim.SGD", {"betas": [0.9, 0.9]}, "optimizer.betas", "it takes lr, momentum"),
        ("torch.optim.SGD", {"momentum": -1}, "optimizer", "Invalid momentum"),
        ("torch.optim.SDG", {}, "optimizer.type", "did you mean torch.optim.SGD"),
        (f"{HERE}.NoOptimizer", {}, "optimizer.type", "no torch.optim.Optimizer"),
        (f"{HERE}.Plain", {"weight_decay": 0.1}, "optimizer.weight_decay", "no argument of Plain"),
        (f"{HERE}.Rateless", {}, "optimizer.learning_rate", "no learning rate"),
        (f"{HERE}.Plain", {"groups": [{"match": "embed", "scale": 2}]},
         "optimizer.groups.0.scale", "it takes lr"),
        (f"{HERE}.Plain", {"groups": [{"match": "embed", "weight_decay": 0.1}]},
         "optimizer.groups.0.weight_decay", "it takes lr"),
        (f"{HERE}.Rateless", {"learning_rate": 0.1}, "optimizer.lr", "no argument"),
    ],
)  # fmt: skip
def test_what_does_not_fit(kind: str, stated: dict[str, Any], place: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(Net(), kind, **stated)
    assert caught.value.problems[0].place == place
    assert sentence in str(caught.value)


def test_the_grammar_is_checked_without_an_import() -> None:
    config = DottedOptimizerConfig.model_validate({"type": "not.there.At.all", "x": 1})
    assert config.type == "not.there.At.all"
    for kind in ("SGD", "torch.", "torch optim.SGD"):
        with pytest.raises(ValidationError, match="dotted path"):
            DottedOptimizerConfig.model_validate({"type": kind})


def of(cls: Any, **arguments: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = cls([nn.Parameter(torch.zeros(2, 2))], **arguments)
    return optimizer


@pytest.mark.parametrize(
    ("cls", "refused"),
    [
        (torch.optim.LBFGS, {0, 1, 2, 3}),
        (torch.optim.SparseAdam, {0, 1, 2, 3}),
        (torch.optim.Adagrad, {1, 2, 3}),
        (torch.optim.Adafactor, {1, 2, 3}),
        (torch.optim.Muon, {1, 2, 3}),
        (Modes, {3}),
        (torch.optim.SGD, set()),
        (Plain, set()),
    ],
)
def test_what_is_known_to_be_wrong_is_refused(cls: Any, refused: set[int]) -> None:
    for stage in range(4):
        if stage in refused:
            with pytest.raises(RecipeError, match=cls.__name__) as caught:
                check_optimizer(of(cls), zero_stage=stage)
            assert caught.value.problems[0].place == "optimizer.type"
            assert caught.value.problems[0].hint
        else:
            check_optimizer(of(cls), zero_stage=stage)


def test_what_nobody_has_tested_is_said() -> None:
    assert untested(of(Plain), zero_stage=0) == ""
    assert "Plain" in untested(of(Plain), zero_stage=1)
    assert untested(of(torch.optim.SGD), zero_stage=3) == ""
    torchs = {name for name in ELEMENTWISE if hasattr(torch.optim, name)}
    assert torchs - {"AdamW"} <= set(STATED)  # each is tested above
    assert has_modes(of(Modes))
    assert not has_modes(of(Plain))
