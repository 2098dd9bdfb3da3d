"""What is offered, from the recipe alone; and that what lies on the host is not on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.errors import RecipeError
from arctic_like.planning.advice import Change, changes, cheapest
from arctic_like.planning.plan import Machine, recomputed_share
from tests.integration.tools import recipe, write_conversations, write_recipe
from tests.planning.matrix import LLAMA
from tests.planning.test_plan_command import planned

ONE_GPU = Machine(1, on_gpu=True)
NONE = "model.activation_checkpointing=none"
KEPT = "model.disable_activation_checkpoint=true"
FULL = "model.activation_checkpointing=full"
TILES = "tiled_mlp_compute=true"
AWAY = "activation_checkpoint_cpu_offload=true"
PREFIX = "model.peft_config={type: prefix_tuning, num_virtual_tokens: 4}"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advice")
    data = write_conversations(folder / "conversations.jsonl")
    content = recipe(
        data, model__config={**LLAMA, "hidden_size": 512, "num_hidden_layers": 8}, model__dtype="bf16",
        train_iters=1, micro_batch_size=4, data__pack_samples=True, data__max_length=256,
    )  # fmt: skip
    del content["model"]["disable_activation_checkpoint"]
    return write_recipe(folder / "recipe.yaml", content)


def offered(path: Path, *words: str, machine: Machine = ONE_GPU) -> list[str]:
    config = load_recipe(path, ["micro_batch_size=1", *words]).config
    return [word for change in changes(config, machine) for word in change.overrides]


@pytest.mark.parametrize(("words", "said"), [
    ((), [TILES, AWAY]),  # everything is checkpointed unless the recipe says otherwise
    ((NONE,), [FULL, TILES, FULL, AWAY]),
    ((KEPT,), [FULL, KEPT.replace("true", "false"), TILES, FULL, KEPT.replace("true", "false"), AWAY]),
    (("model.activation_checkpointing=4",), [FULL, TILES, FULL, AWAY]),
    (("model.activation_checkpointing=selective",), [FULL, TILES, FULL, AWAY]),
    ((TILES, AWAY), []),
    ((PREFIX, NONE, "data.pack_samples=false"), [TILES]),  # prefix tuning cannot compute layers again
])  # fmt: skip
def test_offers_what_saves_activations(path: Path, words: tuple[str, ...], said: list[str]) -> None:
    found = [
        word for word in offered(path, *words) if not word.startswith(("deepspeed", "optimizer"))
    ]
    assert found == said


def test_what_is_offered_is_a_recipe(path: Path) -> None:
    for words in ((), (NONE,), (KEPT,), ("model.activation_checkpointing=selective",)):
        config = load_recipe(path, list(words)).config
        for change in changes(config, ONE_GPU):
            load_recipe(path, [*words, *change.overrides])


def test_ranks_that_share_layers_go_on_to(path: Path) -> None:
    """What cannot be combined with it is not offered, nor a higher stage where no two ranks have one part."""
    words = ("deepspeed.tensor_parallel.autotp_size=2", "deepspeed.zero_optimization.stage=2")
    four, two = Machine(4, on_gpu=True), Machine(2, on_gpu=True)
    stage = "deepspeed.zero_optimization.stage=3"
    assert offered(path, *words, machine=four) == [AWAY, stage]
    assert offered(path, *words, machine=two) == [AWAY]
    config = load_recipe(path, list(words)).config
    for change in changes(config, four):
        changed = load_recipe(path, [*words, *change.overrides]).config
        assert changed.deepspeed["tensor_parallel"] == {"autotp_size": 2}
        assert (
            changed.resolve_batch(2).global_batch_size == config.resolve_batch(2).global_batch_size
        )


def test_on_a_cpu_nothing_goes_to_the_host(path: Path) -> None:
    assert AWAY not in offered(path, machine=Machine())


def test_what_a_recipe_refuses_is_passed_over(path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    class Fits:
        fits = True

    def replan(words: tuple[str, ...]) -> Any:
        asked.append(words)
        if words == (TILES,):
            raise RecipeError("is not built for experts")
        return Fits()

    config = load_recipe(path, ["micro_batch_size=1"]).config
    found = cheapest(config, ONE_GPU, replan)
    assert asked == [(TILES,), (AWAY,)]
    assert found is not None
    assert found[0] == Change((AWAY,), found[0].price)


@pytest.mark.parametrize(
    ("how", "share"), [("full", 1), ("4", 0.25), ("selective", 0), ("none", 0)]
)
def test_what_is_computed_again(path: Path, how: str, share: float) -> None:
    config = load_recipe(path, [f"model.activation_checkpointing={how}"]).config
    assert recomputed_share(config.model) == share


@pytest.mark.full
def test_checkpoints_on_the_host_are_not_on_the_device(path: Path) -> None:
    """A layer's input is 16 · 256 · 512 bf16 numbers, 4 MiB. Eight lie on the host at once. The
    device's peak is lower by less: it moves to the end of the backward, where the gradients have grown."""
    words = ("micro_batch_size=16", "--gpus", "1", "--no-data")
    _, kept = planned(path, *words)
    _, away = planned(path, AWAY, *words)
    layer = 16 * 256 * 512 * 2
    assert 8 * layer <= away["host_peak_per_rank"] < 9 * layer
    assert layer <= kept["peak"] - away["peak"] <= 8 * layer


@pytest.mark.full
def test_bf16_states_take_eight_bytes_less(path: Path) -> None:
    """Two moments in bf16, 4 bytes a parameter; the master weights are the model's own (`engine/thrift.py`).
    In fp32 the three take 12."""
    words = (
        "optimizer.type=adamw_bf16", "deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true",
        "deepspeed.bf16.bf16_master_weights_and_grads=true", "deepspeed.bf16.bf16_optimizer_states=true",
    )  # fmt: skip
    _, plain = planned(path, words[1], "--gpus", "1")
    _, low = planned(path, *words, "--gpus", "1")
    count = plain["parameters"]
    assert plain["between_steps"]["optimizer"] == pytest.approx(12 * count, rel=0.01)
    assert low["between_steps"]["optimizer"] == pytest.approx(4 * count, rel=0.01)
    assert low["between_steps"]["weights"] == pytest.approx(2 * count, rel=0.01)
