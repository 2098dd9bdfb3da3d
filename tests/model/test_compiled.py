"""Layers that are compiled compute what they compute as written, and are compiled as often as is said."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.errors import RecipeError
from arctic_like.model.isolation import packed_inputs
from arctic_like.stop import StopRequest
from tests.integration.tools import recipe, train_lines, write_conversations, write_recipe

from .shapes import LLAMA, make

MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 2}
LORA = {"type": "lora", "r": 4, "target_modules": "all-linear"}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch's tracing, graphs and their backward, without the minute that generating code takes; gives
    the number of graphs so far."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def step(model: Any, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, gradient of all that is trained) of two packed rows."""
    first = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)])
    positions = torch.stack([first, first.roll(length // 3)])
    positions[1] = torch.cat([torch.arange(length - 4), torch.arange(4)])
    tokens = (positions * 7 + torch.arange(length) * 5 + 3) % 262
    model.zero_grad()
    logits = model(**packed_inputs(model, tokens, positions)).logits
    weights = torch.linspace(-1, 1, logits.numel()).cos().view_as(logits)
    (logits * weights).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(grads)


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(one, marks=pytest.mark.full) for one in (
        {"activation_checkpointing": "none"}, {"peft_config": LORA}, {"attn_implementation": "varlen"}))],
    ids=["checkpointed", "kept", "lora", "varlen"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_packed_rows_of_several_lengths(
    shape: dict[str, Any], options: dict[str, Any], traced: Any
) -> None:
    plain, compiled = make(shape, **options), make(shape, compile="blocks", **options)
    for length in (13, 17, 24, 31):
        for found, expected in zip(step(compiled, length), step(plain, length), strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert traced() == 2, "one graph for the first length and one for any, shared by the layers"
    before = traced()
    step(compiled, 28)
    assert traced() == before, "any other length is compiled already"


def test_only_what_has_gradients_is_compiled(traced: Any) -> None:
    model = make(LLAMA, compile=True).eval()
    plain = make(LLAMA).eval()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    sampling = {"max_new_tokens": 3, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(tokens, **sampling), plain.generate(tokens, **sampling))
    assert traced() == 0
    model(tokens).logits.sum().backward()
    assert traced() > 0


def test_names_and_copies_are_those_of_the_model(traced: Any) -> None:
    model, plain = make(LLAMA, compile="blocks"), make(LLAMA)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    twin = copy.deepcopy(model)
    assert all(layer._compiled_call_impl is None for layer in twin.model.layers)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"deepspeed__zero_optimization__stage": 3}, "ZeRO 3"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"tiled_mlp_compute": True}, "tiled_mlp_compute"),
        ({"activation_checkpoint_cpu_offload": True}, "cpu_offload"),
        ({"model__activation_checkpointing": "selective", "model__disable_activation_checkpoint": False},
         "selective"),
        ({"model__type": "liger"}, "liger"),
        ({"deterministic": True}, "deterministic"),
        ({"model__peft_config": {"type": "prefix_tuning", "num_virtual_tokens": 4},
          "data__pack_samples": False}, "virtual tokens"),
    ],
)  # fmt: skip
def test_what_it_is_not_combined_with_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    from arctic_like.trainer.memory import memory_problems

    data = write_conversations(tmp_path / "data.jsonl", count=2)
    content = recipe(data, model__compile="blocks", **changes)
    config = load_recipe(write_recipe(tmp_path / "recipe.yaml", content)).config
    found = [p for p in memory_problems(config) if p.place == "model.compile"]
    assert len(found) == 1
    assert words in found[0].message
    fine = recipe(data, model__compile="blocks")
    config = load_recipe(write_recipe(tmp_path / "fine.yaml", fine)).config
    assert not list(memory_problems(config))


def test_zero_3_is_refused_where_the_model_is_built() -> None:
    from arctic_like.model.compiled import compile_blocks

    with pytest.raises(RecipeError, match=r"model\.compile.*ZeRO 3"):
        compile_blocks(make(LLAMA), device="cpu", zero_stage=3)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 2])
def test_a_compiled_run_is_the_run_as_written(tmp_path: Path, stage: int) -> None:
    """Inductor's kernels, packed rows of changing lengths, accumulation, an evaluation between."""
    data = write_conversations(tmp_path / "data.jsonl", count=40)
    content = recipe(
        data, train_iters=5, gradient_accumulation_steps=2, eval_interval=2,
        data__train_eval_split=[0.8, 0.2], model__disable_activation_checkpoint=False,
        deepspeed__zero_optimization__stage=stage,
    )  # fmt: skip
    found = {}
    for name, extra in (("plain", []), ("compiled", ["model.compile=blocks"])):
        path = write_recipe(tmp_path / f"{name}.yaml", content)
        execute(load_recipe(path, extra), output_dir=tmp_path / name, resume="", stop=StopRequest())
        found[name] = [(one["loss"], one["grad_norm"]) for one in train_lines(tmp_path / name)]
    assert len(found["plain"]) == 5
    for mine, other in zip(found["compiled"], found["plain"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
