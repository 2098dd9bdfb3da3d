"""Parameter groups by pattern: who belongs where, and what an error shows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from arctic_like.errors import RecipeError
from arctic_like.optimizer.adam import AdamWConfig, AdamWFactory
from arctic_like.optimizer.base import GroupConfig
from arctic_like.optimizer.groups import GROUP, parameter_groups

from .test_adam import Net


def groups_of(net: nn.Module, *patterns: str, decay: float | None = 0.1) -> dict[str, set[str]]:
    """Group → names of its parameters; decayed and plain together."""
    names = {id(p): name for name, p in net.named_parameters()}
    found: dict[str, set[str]] = {}
    groups = [GroupConfig(match=pattern) for pattern in patterns]
    for group in parameter_groups(net, weight_decay=decay, groups=groups):
        found.setdefault(group[GROUP], set()).update(names[id(p)] for p in group["params"])
    return found


def test_the_first_match_has_a_parameter_and_the_rest_is_the_default() -> None:
    assert groups_of(Net(), "linear", r"bias$|norm") == {
        "": {"embed.weight", "experts.gate_up_proj"},
        "linear": {"linear.weight", "linear.bias"},
        r"bias$|norm": {"norm.weight", "norm.bias", "experts.gate_up_proj_bias"},
    }


def test_a_shared_parameter_is_found_by_any_of_its_names() -> None:
    assert groups_of(Net(), "^head")["^head"] == {"embed.weight"}  # the head shares it


@given(st.lists(st.sampled_from(["embed", "bias", "weight", "norm", "n", ".", "expert"]),
                unique=True, max_size=4))  # fmt: skip
def test_every_trained_parameter_is_in_exactly_one_group(patterns: list[str]) -> None:
    net = Net()
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    try:
        found = groups_of(net, *patterns)
    except RecipeError:
        return
    assert sorted(name for members in found.values() for name in members) == sorted(trained)
    for name in trained:
        aliases = [name, "head.weight"] if name == "embed.weight" else [name]
        first = next((p for p in patterns if any(re.search(p, a) for a in aliases)), "")
        assert name in found[first]


def test_what_a_group_states_and_what_it_leaves_out() -> None:
    config = AdamWConfig.model_validate({
        "learning_rate": 1e-2, "weight_decay": 0.3, "betas": [0.8, 0.9],
        "groups": [
            {"match": "embed", "name": "vocabulary", "lr": "1e-3", "weight_decay": 0},
            {"match": "linear", "betas": [0.5, 0.6], "eps": 1e-6},
        ],
    })  # fmt: skip
    optimizer = AdamWFactory(config).build(model=Net(), device="cpu", offload=False)
    keys = (GROUP, "lr", "weight_decay", "betas", "eps")
    assert [tuple(group[key] for key in keys) for group in optimizer.param_groups] == [
        ("", 1e-2, 0.3, (0.8, 0.9), 1e-8),
        ("", 1e-2, 0.0, (0.8, 0.9), 1e-8),
        ("vocabulary", 1e-3, 0.0, (0.8, 0.9), 1e-8),
        ("linear", 1e-2, 0.3, (0.5, 0.6), 1e-6),
        ("linear", 1e-2, 0.0, (0.5, 0.6), 1e-6),
    ]


def test_without_weight_decay_there_is_one_group_each() -> None:
    found = parameter_groups(Net(), weight_decay=None, groups=[GroupConfig(match="linear")])
    assert [len(group["params"]) for group in found] == [5, 2]
    assert all("weight_decay" not in group for group in found)


@pytest.mark.parametrize(
    ("patterns", "sentences"),
    [
        (["no_such"], ["no parameter's name contains", "embed.weight"]),
        (["linear", r"linear\.bias"], ["earlier groups have all 1", "linear.bias"]),
        (["frozen"], ["frozen parameters only", "frozen.weight"]),
    ],
)
def test_a_group_without_parameters_is_an_error(patterns: list[str], sentences: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        groups_of(Net(), *patterns)
    assert caught.value.problems[0].place == f"optimizer.groups.{len(patterns) - 1}.match"
    for sentence in sentences:
        assert sentence in str(caught.value)


def test_an_error_shows_some_names_of_a_large_model() -> None:
    net = nn.ModuleList([nn.Linear(1, 1) for _ in range(100)])
    with pytest.raises(RecipeError) as caught:
        groups_of(net, "attention")
    text = str(caught.value)
    for shown in ("0.weight", "99.bias", "(200 in all)"):
        assert shown in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("groups", "place"),
    [
        ([{"match": "(a"}], ("groups", 0, "match")),
        ([{"match": ""}], ("groups", 0, "match")),
        ([{"match": "a"}, {"match": "a"}], ()),
        ([{"match": "a", "name": "b"}, {"match": "b"}], ()),
        ([{"match": "a", "momentum": 0.9}], ("groups", 0, "momentum")),
        ([{"match": "a", "betas": [0.9, 1.0]}], ("groups", 0, "betas")),
        ([{"learning_rate": 1}], ("groups", 0, "match")),
        ([{"match": "a", "scheduler": {"type": "cosin"}}], ("groups", 0, "scheduler")),
    ],
)
def test_groups_that_cannot_be(groups: list[Any], place: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        AdamWConfig.model_validate({"groups": groups})
    assert caught.value.errors()[0]["loc"] == place


def test_an_update_is_that_of_two_optimizers() -> None:
    """A group trains as if it had an optimizer of its own."""
    torch.manual_seed(0)
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.load_state_dict(one.state_dict())
    config = AdamWConfig.model_validate(
        {"lr": 0.1, "groups": [{"match": "bias", "lr": 0.3, "betas": [0.5, 0.7]}]}
    )
    grouped = AdamWFactory(config).build(model=one, device="cpu", offload=False)
    apart = [
        torch.optim.AdamW([other.weight], lr=0.1, weight_decay=0.1),
        torch.optim.AdamW([other.bias], lr=0.3, betas=(0.5, 0.7), weight_decay=0.0),
    ]
    for _ in range(4):
        x = torch.randn(5, 3)
        for net, optimizers in ((one, [grouped]), (other, apart)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            net(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    torch.testing.assert_close(one.weight, other.weight)
    torch.testing.assert_close(one.bias, other.bias)


def test_a_resume_refuses_other_patterns_and_takes_other_settings() -> None:
    from arctic_like.trainer.continuity import check_continuity

    def of(*groups: dict[str, Any]) -> dict[str, Any]:
        return {"optimizer": {"groups": list(groups)}}

    saved = {"recipe": of({"match": "embed", "learning_rate": 0.1})}
    found = check_continuity(saved, of({"match": "embed", "learning_rate": 0.2}), allow=False)
    assert found == ["optimizer.groups.0.learning_rate: 0.1 → 0.2"]
    for other in (of({"match": "head"}), of(), of({"match": "embed"}, {"match": "head"})):
        with pytest.raises(RecipeError, match=r"optimizer\.groups\.\d\.match"):
            check_continuity(saved, other, allow=False)
