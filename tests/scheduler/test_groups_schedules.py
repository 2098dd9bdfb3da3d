"""Schedules of groups, of dotted paths and by metrics: against torch's own, and brought back whole."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from arctic_like.errors import RecipeError, RunError
from arctic_like.registry.choice import Choice
from arctic_like.run_info import RunInfo
from arctic_like.scheduler.base import SchedulerConfig
from arctic_like.scheduler.closed_form import cosine_with_floor, wsd
from arctic_like.scheduler.schedules import Schedules
from arctic_like.world import World

TOTAL, PER_EPOCH, RATE = 24, 6, 0.5
TORCH = "torch.optim.lr_scheduler"


def config_of(**stated: Any) -> SchedulerConfig:
    _, kind = Choice("scheduler").config_class(stated.get("type", "huggingface"))
    config = kind.model_validate(stated)
    assert isinstance(config, SchedulerConfig)
    return config


def sgd(*rates: float) -> torch.optim.Optimizer:
    """A group for each rate: the default's first, then "a", "b" …"""
    names = ["", "a", "b", "c"]
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "group_name": name}
        for rate, name in zip(rates, names, strict=False)
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def schedules(
    optimizer: torch.optim.Optimizer,
    scheduler: SchedulerConfig,
    groups: dict[str, SchedulerConfig | None] | None = None,
    **more: Any,
) -> Schedules:
    info = RunInfo(
        output_dir=Path(), seed=0, world=World(), device="cpu", training_horizon=TOTAL,
        steps_per_epoch=PER_EPOCH, epochs=4,
    )  # fmt: skip
    return Schedules(optimizer, scheduler, info=info, groups=groups, **more)


Losses = Callable[[int], float]


def losses(step: int) -> float:
    """A metric that improves, then does not, then does."""
    return [5.0, 4.0, 4.1, 4.2, 4.3, 3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 2.0][step // 2 % 12]


def run(
    one: Schedules, start: int = 0, stop: int = TOTAL, each: Callable[[int], None] | None = None
) -> list[dict[str, float]]:
    """As the training loop does: the rates of each step; evaluation every second step."""
    seen = []
    for step in range(start, stop):
        seen.append(one.learning_rates())
        one.step()
        if step % 2:
            one.after_evaluation({"eval/loss": losses(step), "eval/accuracy": -losses(step)})
        if (step + 1) % PER_EPOCH == 0:
            one.after_epoch()
        if each:
            each(step)
    return seen


def test_each_group_follows_its_own_schedule_in_closed_form() -> None:
    default = config_of(type="cosine_with_floor", warmup_steps=3)
    groups = {
        "a": None,
        "b": config_of(type="wsd", warmup_steps=2, decay_steps=5, decay_shape="linear"),
        "c": config_of(type="huggingface", name="linear", interval="epoch", warmup_steps=0),
    }
    seen = run(schedules(sgd(RATE, 0.1, 0.2, 0.3), default, groups))
    for step, rates in enumerate(seen):
        cosine = cosine_with_floor(step, total=TOTAL, warmup=3, floor=0.1)
        expected = {
            "learning_rate": RATE * cosine,
            "learning_rate/a": 0.1 * cosine,
            "learning_rate/b": 0.2
            * wsd(step, total=TOTAL, warmup=2, decay=5, shape="linear", floor=0.0),
            "learning_rate/c": 0.3 * (1 - (step // PER_EPOCH) / 4),
        }
        assert rates == pytest.approx(expected, rel=1e-12), step
        assert next(iter(rates)) == "learning_rate"


def test_where_groups_have_all_parameters_the_first_stands_for_the_run() -> None:
    optimizer = sgd(RATE, 0.1)
    optimizer.param_groups[0]["group_name"] = "b"
    one = schedules(optimizer, config_of(type="wsd", warmup_steps=0), {"b": None, "a": None})
    assert one.learning_rates() == {
        "learning_rate": RATE, "learning_rate/b": RATE, "learning_rate/a": 0.1,
    }  # fmt: skip


def test_an_optimizer_that_says_no_group_has_the_default() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    one = schedules(optimizer, config_of(type="wsd", warmup_steps=0))
    assert one.learning_rates() == {"learning_rate": RATE}
    with pytest.raises(RecipeError, match="was built without"):
        schedules(optimizer, config_of(type="wsd"), {"embed": None})


DOTTED: dict[str, dict[str, Any]] = {
    "ExponentialLR": {"gamma": "90%"},
    "StepLR": {"step_size": 5, "gamma": 0.5},
    "MultiStepLR": {"milestones": [3, 9, 9], "gamma": 0.1},
    "LinearLR": {"start_factor": 0.1, "total_iters": 7},
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "PolynomialLR": {"total_iters": 20, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 8, "eta_min": 0.01},
    "CosineAnnealingWarmRestarts": {"T_0": 5, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.5, "step_size_up": 4, "mode": "exp_range",
                 "gamma": 0.95},
    "OneCycleLR": {"max_lr": 0.5},
    "ReduceLROnPlateau": {"interval": "metric", "patience": 1, "factor": 0.5},
}  # fmt: skip


def test_every_schedule_of_torch_is_looked_at() -> None:
    known = {
        name for name, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }  # fmt: skip
    take_code = {"LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
    assert known - take_code - {"LRScheduler", "_LRScheduler"} == set(DOTTED)


def bare(name: str, stated: dict[str, Any]) -> list[tuple[float, float]]:
    """torch's own schedule in a plain loop: rate and momentum of each step."""
    optimizer = sgd(RATE)
    given = {k: v for k, v in stated.items() if k != "interval"}
    given |= {"gamma": 0.9} if given.get("gamma") == "90%" else {}
    given |= {"total_steps": TOTAL} if name == "OneCycleLR" else {}
    scheduler = getattr(lr_scheduler, name)(optimizer, **given)
    seen = []
    for step in range(TOTAL):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if name != "ReduceLROnPlateau":
            scheduler.step()
        elif step % 2:
            scheduler.step(losses(step))
    return seen


@pytest.mark.parametrize("name", DOTTED)
@pytest.mark.filterwarnings("error")
def test_a_schedule_by_its_path_is_torchs_own(name: str) -> None:
    optimizer = sgd(RATE)
    one = schedules(optimizer, config_of(type=f"{TORCH}.{name}", **DOTTED[name]))
    momenta: list[float] = [optimizer.param_groups[0]["momentum"]]
    seen = run(one, each=lambda _: momenta.append(optimizer.param_groups[0]["momentum"]))
    found = [(rates["learning_rate"], m) for rates, m in zip(seen, momenta, strict=False)]
    assert found == bare(name, DOTTED[name])
    assert len({rate for rate, _ in found}) > 1


KINDS: list[dict[str, Any]] = [
    *[{"type": f"{TORCH}.{name}", **stated} for name, stated in DOTTED.items()],
    {"type": "plateau", "patience": 1, "cooldown": 1},
    {"type": "plateau", "patience": 0, "metric": "accuracy", "mode": "max"},
    {"type": "wsd"},
    {"type": "cosine_with_floor", "interval": "epoch", "warmup_steps": 1},
    {"type": "huggingface", "name": "cosine"},
    {"type": "huggingface", "name": "reduce_lr_on_plateau", "interval": "metric",
     "scheduler_specific_kwargs": {"patience": 1}},
    {"type": "huggingface", "name": "greedy", "interval": "metric",
     "scheduler_specific_kwargs": {"patience": 1, "smooth": True, "window_size": 2}},
]  # fmt: skip


@pytest.mark.parametrize("stated", KINDS, ids=lambda s: f"{s['type']}-{s.get('name', '')}")
@pytest.mark.parametrize("at", [3, 11, 17])
def test_a_schedule_goes_on_to_the_bit(stated: dict[str, Any], at: int) -> None:
    """Through a file, as a checkpoint does it, on an optimizer that was loaded before."""
    groups = {"a": config_of(**stated)}
    default = config_of(type="cosine_with_floor", warmup_steps=2)

    def fresh() -> tuple[Schedules, torch.optim.Optimizer]:
        optimizer = sgd(RATE, 0.25)
        return schedules(optimizer, default, dict(groups)), optimizer

    straight, optimizer = fresh()
    expected = run(straight)
    first, optimizer = fresh()
    assert run(first, 0, at) == expected[:at]
    file = io.BytesIO()
    torch.save({"s": first.state_dict(), "o": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    optimizer.load_state_dict(saved["o"])
    second.load_state_dict(saved["s"])
    momentum = optimizer.param_groups[1]["momentum"]
    assert momentum == first.optimizer.param_groups[1]["momentum"]
    assert run(second, at) == expected[at:]


def test_what_the_recipe_states_holds_and_what_the_run_moved_comes_back() -> None:
    """A momentum changed on purpose stays changed; one that a schedule cycles is restored."""
    cycle = config_of(type=f"{TORCH}.OneCycleLR", max_lr=0.5)
    optimizer = sgd(RATE, 0.25)
    first = schedules(optimizer, config_of(type="wsd"), {"a": cycle})
    run(first, 0, 5)
    state = copy.deepcopy(first.state_dict())
    changed = sgd(RATE, 0.25)
    changed.param_groups[0]["momentum"] = 0.5
    second = schedules(changed, config_of(type="wsd"), {"a": cycle})
    for group, other in zip(changed.param_groups, optimizer.param_groups, strict=True):
        group.update({k: v for k, v in other.items() if k != "params"})  # as a load would
    second.load_state_dict(state)
    assert changed.param_groups[0]["momentum"] == 0.5
    assert changed.param_groups[1]["momentum"] == optimizer.param_groups[1]["momentum"] != 0.9


@pytest.mark.parametrize("at", [0, 7])
@pytest.mark.parametrize("kind", ["wsd", "plateau", f"{TORCH}.ExponentialLR"])
def test_a_learning_rate_changed_at_a_resume_scales_what_follows(kind: str, at: int) -> None:
    stated: dict[str, Any] = {
        "plateau": {"patience": 0}, "wsd": {}, f"{TORCH}.ExponentialLR": {"gamma": 0.9},
    }[kind]  # fmt: skip
    config = config_of(type=kind, **stated)
    expected = [rates["learning_rate"] / 2 for rates in run(schedules(sgd(RATE), config))]
    first = schedules(sgd(RATE), config)
    run(first, 0, at)
    second = schedules(sgd(RATE / 2), config)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found = [rates["learning_rate"] for rates in run(second, at)]
    assert found == pytest.approx(expected[at:], rel=1e-12)


def test_a_schedule_cannot_become_another_one() -> None:
    first = schedules(sgd(RATE, 0.1), config_of(type="wsd"), {"a": config_of(type="plateau")})
    second = schedules(sgd(RATE, 0.1), config_of(type="wsd"), {"a": config_of(type="wsd")})
    with pytest.raises(RecipeError) as caught:
        second.load_state_dict(first.state_dict())
    assert caught.value.problems[0].place == "optimizer.groups.0.scheduler.type"
    assert "ReduceLROnPlateau by metric" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    metrics=st.lists(
        st.floats(-10, 10) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=30
    ),
    mode=st.sampled_from(["min", "max"]), factor=st.floats(0.05, 0.95),
    patience=st.integers(0, 4), cooldown=st.integers(0, 3), threshold=st.floats(0, 0.5),
    threshold_mode=st.sampled_from(["rel", "abs"]), min_lr=st.floats(0, 0.4),
)  # fmt: skip
def test_plateau_is_torchs(metrics: list[float], **stated: Any) -> None:
    optimizer = sgd(RATE)
    bare = lr_scheduler.ReduceLROnPlateau(optimizer, **stated)
    one = schedules(sgd(RATE), config_of(type="plateau", **stated))
    for metric in metrics:
        bare.step(metric)
        one.after_evaluation({"eval/loss": metric})
        assert one.learning_rates()["learning_rate"] == optimizer.param_groups[0]["lr"]


def test_the_metric_and_its_direction() -> None:
    asked: list[str] = []

    def direction(name: str) -> str:
        asked.append(name)
        return "max"

    groups: dict[str, SchedulerConfig | None] = {
        "a": config_of(type="plateau", metric="accuracy", patience=0),
        "b": config_of(type="plateau", metric="eval/loss", mode="min", patience=0),
    }
    one = schedules(
        sgd(RATE, 1.0, 1.0), config_of(type="plateau", patience=0), groups,
        monitored="eval/reward", direction=direction,
    )  # fmt: skip
    assert asked == ["eval/reward", "accuracy", "eval/loss"]
    assert one.follows_a_metric
    for value in (1.0, 2.0, 3.0):
        one.after_evaluation({"eval/reward": value, "eval/accuracy": -value, "eval/loss": value})
    assert one.learning_rates() == pytest.approx(
        {"learning_rate": RATE, "learning_rate/a": 0.01, "learning_rate/b": 0.01}
    )


def test_a_schedule_reads_the_rate_of_its_own_group() -> None:
    """transformers' polynomial ends at an absolute rate, which it relates to the optimizer's."""
    polynomial = config_of(
        type="huggingface", name="polynomial", warmup_steps=0,
        scheduler_specific_kwargs={"power": 1.0, "lr_end": 0.01},
    )  # fmt: skip
    seen = run(schedules(sgd(RATE, 0.04), config_of(type="wsd"), {"a": polynomial}))
    expected = [0.01 + 0.03 * (1 - step / TOTAL) for step in range(TOTAL)]
    assert [rates["learning_rate/a"] for rates in seen] == pytest.approx(expected, rel=1e-12)


def test_a_group_may_stand_still_by_epochs() -> None:
    still = config_of(type="huggingface", name="linear", interval="epoch", warmup_steps=0)
    assert run(schedules(sgd(RATE, 0.0), config_of(type="wsd"), {"a": still}))


def test_a_metric_that_is_not_measured() -> None:
    one = schedules(sgd(RATE), config_of(type="plateau", metric="eval/acuracy"))
    with pytest.raises(RunError, match=r"'eval/acuracy'.*eval/accuracy"):
        one.after_evaluation({"eval/accuracy": 1.0})
    late = schedules(sgd(RATE), config_of(type="plateau", patience=0))
    for results in ({"eval/loss": 1.0}, {}, {"eval/loss": 2.0}):  # one without it is passed over
        late.after_evaluation(results)
    assert late.learning_rates()["learning_rate"] == pytest.approx(RATE / 10)
    resumed = schedules(sgd(RATE), config_of(type="plateau", patience=0))
    resumed.load_state_dict(late.state_dict())
    resumed.after_evaluation({})


@pytest.mark.parametrize(
    ("stated", "place", "sentence"),
    [
        ({"type": f"{TORCH}.StepLR"}, "scheduler.step_size", "is needed by StepLR"),
        ({"type": f"{TORCH}.StepLR", "step_size": 2, "gama": 1}, "scheduler.gama", "'gamma'"),
        ({"type": f"{TORCH}.StepLr", "step_size": 2}, "scheduler.type", "StepLR"),
        ({"type": f"{TORCH}.StepLR", "step_size": 2, "warmup_steps": 2},
         "scheduler.warmup_steps", "takes no warmup_steps"),
        ({"type": f"{TORCH}.ReduceLROnPlateau"}, "scheduler.interval", "set it to metric"),
        ({"type": f"{TORCH}.StepLR", "step_size": 2, "interval": "metric"},
         "scheduler.interval", "follows no metric"),
        ({"type": f"{TORCH}.LambdaLR", "lr_lambda": "x"}, "scheduler", "refuses its settings"),
        ({"type": "collections.OrderedDict"}, "scheduler.type", "no learning-rate scheduler"),
        ({"name": "cosine", "interval": "epoch", "warmup_steps": 1}, "scheduler.interval",
         "whole first epoch"),
        ({"type": "wsd", "warmup_steps": 24}, "scheduler.warmup_steps", "leaves no step"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(stated: dict[str, Any], place: str, sentence: str) -> None:
    for groups, prefix in (({}, ""), ({"a": config_of(**stated)}, "optimizer.groups.0.")):
        default = config_of(type="wsd") if groups else config_of(**stated)
        with pytest.raises(RecipeError) as caught:
            schedules(sgd(RATE, 0.1), default, dict(groups))
        assert caught.value.problems[0].place == prefix + place
        assert sentence in str(caught.value)
