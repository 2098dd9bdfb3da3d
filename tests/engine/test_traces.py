"""Weights that ZeRO 3 gathers stay, or not, from the forward to the backward as the recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.engine import traces
from arctic_like.stop import StopRequest
from tests.integration.tools import recipe, write_conversations, write_recipe

STEPS = 4


@pytest.mark.parametrize("distance", [10**9, 0])
def test_checks_before_the_first_step_change_nothing_of_it(tmp_path: Path, distance: int) -> None:
    """Packed rows are checked by forward passes without a backward. DeepSpeed drops what it recorded of these
    in step 1, records step 2, and from step 3 on frees what is not needed again within `distance` numbers."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    content = recipe(
        write_conversations(tmp_path / "conversations.jsonl"), train_iters=STEPS, data__pack_samples=True,
        deepspeed__zero_optimization={"stage": 3, "stage3_max_reuse_distance": distance,
                                       "stage3_prefetch_bucket_size": 0},
    )  # fmt: skip
    path = write_recipe(tmp_path / "recipe.yaml", content)
    kept: list[tuple[int, int]] = []

    def watch(trainer: Any) -> None:
        engine = trainer.learner("model").engine
        shared = [p for p in engine.module.parameters() if not p.ds_persist]
        backward = engine.backward

        def went_back(loss: Any, *, last: bool) -> None:
            there = sum(p.ds_status == ZeroParamStatus.AVAILABLE for p in shared)
            kept.append((there, len(shared)))
            backward(loss, last=last)

        engine.backward = went_back

    execute(
        load_recipe(path, []), output_dir=tmp_path / "run", resume="", stop=StopRequest(), inspect=watch
    )  # fmt: skip
    assert len(kept) == STEPS
    for there, all_of_them in kept[2:]:
        assert there == (all_of_them if distance else 0)
    memo: Any = traces._memo()
    assert memo.__self__.cache_info().currsize == 0  # no engine's model is kept alive
