"""bf16 weights and states, rounded at random: right in expectation, repeatable, and not stalled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like import load_recipe
from arctic_like.api import refuse_what_cannot_run
from arctic_like.errors import RecipeError
from arctic_like.optimizer.adam_bf16 import round_stochastically, stochastic_adamw
from tests.integration.tools import drive, recipe, train_lines, write_conversations, write_recipe

ARGUMENTS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(target, values.clone(), torch.Generator().manual_seed(seed))
    return target


@settings(max_examples=60, deadline=None)
@given(st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: abs(x) > 1e-30))
def test_a_value_goes_to_a_neighbour_and_is_right_on_average(value: float) -> None:
    draws = 40_000
    exact = torch.full((draws,), value, dtype=torch.float32)
    found = rounded(exact).double()
    down = (exact[:1].view(torch.int32) & -65536).view(torch.float32).double()
    up = ((exact[:1].view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert bool(((found == down) | (found == up)).all())
    gap = float((up - down).abs())
    assert abs(float(found.mean()) - float(exact[0].double())) <= 5 * 0.5 * gap / draws**0.5


def test_what_bf16_can_hold_stays_and_so_do_infinity_and_nan() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
    assert torch.equal(rounded(exact).float(), exact)
    assert bool(rounded(torch.tensor([float("nan")])).isnan().all())


def test_over_fp32_it_is_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = [torch.randn(3, 5), torch.randn(5, 7).t()]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = (
        stochastic_adamw()(ours, **ARGUMENTS, seed=0), torch.optim.AdamW(theirs, **ARGUMENTS)
    )  # fmt: skip
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rounding_depends_on_seed_and_step_and_survives_a_resume() -> None:
    def run(seed: int, *, cut: bool) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = stochastic_adamw()([weight], **ARGUMENTS, seed=seed)
        for step in range(6):
            if cut and step == 3:
                state = optimizer.state_dict()
                weight = torch.nn.Parameter(weight.detach().clone())
                optimizer = stochastic_adamw()([weight], **ARGUMENTS, seed=seed)
                optimizer.load_state_dict(state)
                torch.manual_seed(99)  # the global generators have no part in it
            weight.grad = torch.full_like(weight, 0.01 * (step + 1))
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(1, cut=False), run(1, cut=True))
    assert not torch.equal(run(1, cut=False), run(2, cut=False))


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "stage"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.full),
                         pytest.param(2, 3, marks=pytest.mark.full)],
)  # fmt: skip
def test_it_reaches_what_fp32_reaches_where_plain_bf16_stalls(
    tmp_path: Path, ranks: int, stage: int
) -> None:
    """Large weights and a small learning rate: most updates are below half of a bf16 step. And a resume."""
    text = write_conversations(tmp_path / "text.jsonl", count=40)
    keys = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    base = recipe(text)
    model = {**base["model"]["config"], "initializer_range": 0.5}
    shared: dict[str, Any] = {
        "train_iters": 240, "micro_batch_size": 2, "train_log_iter_interval": 10,
        "loss_log_interval": 0, "model__config": model, "model__dtype": "bf16",
        "deepspeed__zero_optimization__stage": stage,
        "scheduler": {"type": "huggingface", "name": "linear"},
    }  # fmt: skip
    runs: dict[str, dict[str, Any]] = {
        "fp32": {"optimizer__learning_rate": 5e-4},
        "plain": {"optimizer__learning_rate": 5e-4, "deepspeed__bf16": keys},
        "stochastic": {"optimizer": {"type": "adamw_bf16", "learning_rate": 5e-4},
                       "deepspeed__bf16": keys,
                       "checkpoint": [{"type": "deepspeed", "save_every_n_steps": 120}]},
    }  # fmt: skip
    jobs = []
    for name, changes in runs.items():
        path = write_recipe(tmp_path / f"{name}.yaml", recipe(text, **shared, **changes))
        jobs.append({"recipe": str(path), "output_dir": str(tmp_path / name)})
    cut = {"recipe": jobs[-1]["recipe"], "output_dir": str(tmp_path / "resumed")}
    jobs += [{**cut, "overrides": ["exit_iteration=130"]}, {**cut, "resume": "step-120"}]
    drive(jobs, ranks=ranks, folder=tmp_path)
    last = {name: train_lines(tmp_path / name)[-1]["loss"] for name in (*runs, "resumed")}
    first = train_lines(tmp_path / "fp32")[0]["loss"]
    gained = {name: first - loss for name, loss in last.items()}
    assert gained["plain"] < 0.9 * gained["fp32"], last  # it stalls
    assert last["stochastic"] <= 1.01 * last["fp32"], last
    assert last["resumed"] == last["stochastic"]


def test_without_deepspeeds_bf16_weights_it_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "ice"}\n')
    made = recipe(text, optimizer={"type": "adamw_bf16"}, model__dtype="bf16")
    with pytest.raises(
        RecipeError, match=r"(?s)optimizer.type.*fp32 weights.*bf16_optimizer_states"
    ):
        refuse_what_cannot_run(
            load_recipe(write_recipe(tmp_path / "r.yaml", made), []), on_cpu=True
        )


def test_where_deepspeed_would_keep_fp32_weights_in_silence_it_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "ice"}\n')
    keys = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    made = recipe(text, model__dtype="bf16", deepspeed__bf16=keys,
                  deepspeed__zero_optimization__stage=1)  # fmt: skip
    with pytest.raises(RecipeError, match=r"deepspeed.bf16: keeps bf16 weights at ZeRO 2 and 3"):
        refuse_what_cannot_run(
            load_recipe(write_recipe(tmp_path / "r.yaml", made), []), on_cpu=True
        )
