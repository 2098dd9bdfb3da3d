"""Times from closed forms, and FLOPs against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from arctic_like.callbacks.throughput import model_cost
from arctic_like.planning.devices import DEVICES
from arctic_like.planning.timing import EFFICIENCY, LINK_EFFICIENCY, Work, sent, step_time
from tests.planning.matrix import LLAMA


def work(**changes: float) -> Work:
    base = {
        "model_flops": 6e15, "recomputed_flops": 2e15, "bytes_weights": 16e9, "bytes_gradients": 32e9,
        "bytes_trained_weights": 16e9, "trained": 8e9, "micro_batches": 4, "stage": 2, "ranks": 8,
    }  # fmt: skip
    return Work(**{**base, **changes})  # type: ignore[arg-type]


def test_compute_is_all_operations_over_a_share_of_the_peak() -> None:
    device = DEVICES["h100"]
    assert step_time(work(), device).compute == pytest.approx(8e15 / (989.4e12 * EFFICIENCY))
    assert step_time(work(ranks=1), device).communication == 0


@pytest.mark.parametrize(("stage", "expected"), [
    (0, 2 * 32e9), (1, 32e9 + 16e9), (2, 4 * 32e9 + 16e9), (3, 4 * 32e9 + 2 * 4 * 16e9),
])  # fmt: skip
def test_a_rank_sends_what_zero_says(stage: int, expected: float) -> None:
    """Rajbhandari et al. 2020, section 7, with a reduction for each micro-batch at stages 2 and 3."""
    assert sent(work(stage=stage)) == pytest.approx(expected * 7 / 8)
    found = step_time(work(stage=stage), DEVICES["h100"]).communication
    assert found == pytest.approx(expected * 7 / 8 / (450e9 * LINK_EFFICIENCY))


def test_layers_wait_for_what_their_ranks_exchange_and_repeat_what_is_not_divided() -> None:
    device = DEVICES["h100"]
    alone, shared = (
        step_time(work(bytes_exchanged=sent, repeated_flops=flops), device)
        for sent, flops in ((0, 0), (45e9, 1e15))
    )
    assert alone.total == max(alone.compute, alone.memory, alone.communication)
    assert shared.exchanges == pytest.approx(45e9 / (450e9 * LINK_EFFICIENCY))
    assert shared.compute == pytest.approx(9e15 / (989.4e12 * EFFICIENCY))
    assert shared.total == pytest.approx(shared.compute + shared.exchanges)


def test_flops_of_a_document_are_those_that_torch_counts() -> None:
    """Of one document without gradient checkpointing; torch counts attention in full, as PaLM does, and sees
    neither the embedding's look-up nor the gradient of its input."""
    shape = {key: value for key, value in LLAMA.items() if key != "model_type"}
    config = LlamaConfig(**shape, vocab_size=300, use_cache=False, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros(1, 200, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens).logits.sum().backward()
    cost = model_cost(model)
    assert cost is not None
    assert cost.flops(200, 200**2) == pytest.approx(counter.get_total_flops(), rel=0.01)
