"""On a GPU, steps without a line: CUDA itself says where the host waits for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest
from tests.integration.tools import recipe, write_conversations, write_recipe
from tests.integration.waits import Waits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_without_a_line_do_not_wait_for_cuda(stage: int, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    waits = Waits()

    def watch(trainer: Any) -> None:
        one = trainer._next_step

        def counted() -> None:
            if trainer.global_step not in range(3, 5):
                return one()
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = lambda message, *_: (
                    waits.note("wait") if "synchroniz" in str(message) else None
                )
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    one()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            return None

        trainer._next_step = counted

    content = recipe(
        write_conversations(tmp_path / "data.jsonl"), train_iters=7, train_log_iter_interval=10,
        deepspeed__zero_optimization__stage=stage, deepspeed__gradient_clipping=0.5,
        gradient_accumulation_steps=2, callbacks=[{"type": "ema", "decay": 0.9}],
        data__pack_samples=True, model__dtype="bf16", device="cuda",
    )  # fmt: skip
    execute(
        load_recipe(write_recipe(tmp_path / "recipe.yaml", content)),
        output_dir=tmp_path / "run", resume="", stop=StopRequest(), inspect=watch,
    )  # fmt: skip
    print(stage, waits.found)
    assert waits.of("arctic_like") == {}
