"""Steps without a line do not wait for the device: counted, over methods and ZeRO stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like.api import execute
from arctic_like.recipe import load_recipe
from arctic_like.stop import StopRequest

from .tools import recipe, write_conversations, write_recipe
from .waits import Waits, watch

MASKS = "masking_utils.find_packed_sequence_indices _local_scalar_dense"
"""transformers asks whether a row is packed, where it makes the mask itself (sdpa, eager)."""
OF_DEEPSPEED = {
    0: {"utils.has_overflow_serial", "utils.get_weight_norm"},
    1: {"utils.is_invalid_grad_norm", "utils.clip_tensors_by_global_norm"},
    2: {"utils.is_invalid_grad_norm", "stage_1_and_2.has_overflow"},
    3: {"utils.is_invalid_grad_norm"},
}
"""By stage, in bf16: where DeepSpeed (0.19.8) looks at the gradient's norm to skip what is not finite. No
setting takes these away without taking that away."""


def count(content: dict[str, Any], folder: Path, *, log_every: int = 10) -> Waits:
    """Waits in the steps 3 and 4 of a run."""
    path = write_recipe(folder / "recipe.yaml", {**content, "train_log_iter_interval": log_every})
    waits = Waits()
    assert log_every > 4
    execute(
        load_recipe(path), output_dir=folder / "run", resume="", stop=StopRequest(),
        inspect=lambda trainer: watch(trainer, waits, steps=range(3, 5)),
    )  # fmt: skip
    assert waits.operations > 100
    return waits


def test_the_counter_sees_reads_of_what_comes_from_the_device_and_no_others() -> None:
    waits = Waits()
    device, host = torch.arange(6.0), torch.arange(6.0)
    waits.mark(device)
    with waits, waits.reading():
        float(host.sum())
        host.nonzero()
        assert not waits.found
        float((device * 2).view(2, 3).sum())
        bool((device > 2).any())
        (device + host).tolist()
        device[device > 2]
        host[(device > 2).nonzero()]
    assert sum(waits.found.values()) == 5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_without_a_line_do_not_wait(stage: int, tmp_path: Path) -> None:
    """SFT with loss in tiles, accumulation, clipping, EMA."""
    data = write_conversations(tmp_path / "data.jsonl")
    content = recipe(
        data, train_iters=6, deepspeed__zero_optimization__stage=stage, gradient_accumulation_steps=2,
        deepspeed__gradient_clipping=0.5, callbacks=[{"type": "ema", "decay": 0.9}],
        data__pack_samples=True, model__dtype="bf16",
    )  # fmt: skip
    waits = count(content, tmp_path)
    assert waits.of("arctic_like") == {}
    assert waits.of("transformers") == {MASKS: 4}, "once a micro-batch"
    assert waits.of("torch") == {}
    places = {place.rpartition(" ")[0] for place in waits.of("deepspeed")}
    assert places <= OF_DEEPSPEED[stage]


def test_steps_of_dpo_do_not_wait(tmp_path: Path) -> None:
    """An epoch of seven steps with a reference model, in fp32, where this project clips by itself."""
    from .test_preference_runs import content, write_data

    made = content(
        write_data(tmp_path), "sigmoid", train_iters=6, eval_interval=0, eval_at_end=False,
        global_batch_size=1, micro_batch_size=1, deepspeed__gradient_clipping=0.5,
    )  # fmt: skip
    waits = count(made, tmp_path)
    assert waits.of("arctic_like") == waits.of("torch") == waits.of("deepspeed") == {}
