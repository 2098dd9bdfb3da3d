"""Activations that are away in host memory, on the device's own streams."""

from __future__ import annotations

import pytest
import torch

from arctic_like.model.activations import checkpoint_activations, offload_checkpoints
from tests.model.test_activations import gradients, model_of

pytestmark = pytest.mark.gpu


def test_offloaded_checkpoints_give_the_same_gradients_and_take_less() -> None:
    changes = {"num_hidden_layers": 12, "hidden_size": 512, "intermediate_size": 1024}
    peaks, found = {}, {}
    for away in (False, True):
        model = model_of("llama", dtype=torch.float32, **changes).cuda()
        checkpoint_activations(model, "full")
        if away:
            offload_checkpoints(model)
            for layer in model.model.layers:
                layer._gradient_checkpointing_func.args[0].least_bytes = 1
        with torch.device("cuda"):
            for _ in range(3):  # buffers are used again
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                found[away] = gradients(model)
                peaks[away] = torch.cuda.max_memory_allocated() - before
        del model
    for name, value in found[False].items():
        torch.testing.assert_close(found[True][name], value, rtol=1e-5, atol=1e-6)
    assert peaks[True] < peaks[False]
