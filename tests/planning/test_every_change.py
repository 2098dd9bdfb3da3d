"""Every change that the advice offers, and every sum of them, is planned or refused by a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tools import environment, recipe, write_conversations, write_recipe
from tests.planning.matrix import BF16, LAYERS, LLAMA, LORA, stage

SCRIPT = Path(__file__).with_name("rehearse_changes.py")
SHORT = {**LLAMA, "hidden_size": 32, "intermediate_size": 96}
"""So narrow that MLPs of its 64 tokens are computed in two tiles."""
PARAMETERS_AWAY = "offload_param.device=cpu"
LARGEST_COPY = 3 * 32 * 96 * 4
"""Bytes of a layer's MLP in fp32."""


def tried(
    folder: Path, *, dtype: str, number: int, ranks: int, lora: bool = False, **more: Any
) -> dict[str, Any]:
    """How each change ended: see `rehearse_changes.outcomes`."""
    data = write_conversations(folder / "conversations.jsonl")
    content = recipe(
        data, model__config=SHORT, data__pack_samples=True, data__max_length=64, micro_batch_size=2,
        optimizer={"type": "fused_adam", "learning_rate": 0.001},
        **(BF16 if dtype == "bf16" else {}), **({"model__peft_config": LORA} if lora else {}),
        **stage(number), **more,
    )  # fmt: skip
    path = write_recipe(folder / "recipe.yaml", content)
    listing = folder / "listing.json"
    listing.write_text(json.dumps({"it": {"path": str(path), "ranks": ranks}}))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(listing)],
        env=environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(listing.with_suffix(".tried").read_text())["it"]
    return found


@pytest.mark.parametrize(
    ("dtype", "number", "ranks", "lora"),
    [
        pytest.param(
            dtype, number, ranks, lora,
            id=f"{dtype}-stage-{number}-{ranks}{'-lora' if lora else ''}",
            marks=() if (dtype, number, ranks, lora) == ("fp32", 0, 1, False) else pytest.mark.full,
        )
        for dtype in ("fp32", "bf16") for number in range(4) for ranks in (1, 2)
        for lora in (False, True)
    ],
)  # fmt: skip
def test_is_planned_or_refused(
    tmp_path: Path, *, dtype: str, number: int, ranks: int, lora: bool
) -> None:
    """Where weights and states lie on the host, the host has 12 bytes for every trained parameter, and the
    device, of 18, holds what is gathered and fp32 gradients on their way at the most."""
    found = tried(tmp_path, dtype=dtype, number=number, ranks=ranks, lora=lora)
    assert not {words: told["failed"] for words, told in found.items() if "failed" in told}
    planned = {words: told["planned"] for words, told in found.items() if "planned" in told}
    assert len(planned) >= 8
    away = [plan for words, plan in planned.items() if PARAMETERS_AWAY in words]
    assert away
    for plan in away:
        assert plan["between_steps"].get("optimizer", 0) <= LARGEST_COPY
        assert plan["host_peak_per_rank"] >= 12 * plan["trained_parameters"] / ranks


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "number"), [("fp32", 0), ("bf16", 2)])
def test_of_shared_layers_is_planned(tmp_path: Path, dtype: str, number: int) -> None:
    """Two groups of two ranks; nothing is offered that would be refused."""
    found = tried(tmp_path, dtype=dtype, number=number, ranks=4, **LAYERS)
    assert {ended for told in found.values() for ended in told} == {"planned"}, found
    assert any("stage=3" in words and "cpu_offload=true" in words for words in found)
