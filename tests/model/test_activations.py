"""What is kept for the backward changes memory and time, and neither losses nor gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from arctic_like.errors import RecipeError
from arctic_like.model.activations import (
    DEAR,
    HostStore,
    checkpoint_activations,
    offload_checkpoints,
)
from arctic_like.model.tiled_mlp import tile_mlps
from tests.kernels.test_live_bytes import LiveBytes

from .shapes import GPT2, LLAMA, MIXTRAL, SIZES

LENGTH = 48
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "vocab_size": 64},
    "gpt2": {**GPT2, "vocab_size": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gemma2": {"model_type": "gemma2", "intermediate_size": 48, "num_key_value_heads": 2,
               "head_dim": 8, "vocab_size": 64, **SIZES},
    "mixtral": {**MIXTRAL, "vocab_size": 64},
}  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.products += str(function.overloadpacket).split(".")[-1] in DEAR
        return function(*args, **(kwargs or {}))


def model_of(kind: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SHAPES[kind], **changes}, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def gradients(model: Any, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of a sum over all logits, weighted at random."""
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) % model.config.vocab_size
    torch.manual_seed(seed)
    places = torch.arange(LENGTH).expand(2, LENGTH)
    logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (logits * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close = (1e-9, 1e-12) if value.dtype == torch.float64 else (1e-5, 1e-5)
        torch.testing.assert_close(found[name], value, rtol=close[0], atol=close[1], msg=name)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("how", ["full", "selective", 2])
def test_gradients_are_those_of_keeping_everything(kind: str, how: Any) -> None:
    # a mixture's grouped products know no float64
    model = model_of(kind, dtype=torch.float32 if kind == "mixtral" else torch.float64)
    expected = gradients(model)
    checkpoint_activations(model, how)
    assert_equal(gradients(model), expected)


def test_each_way_computes_again_what_it_says() -> None:
    model = model_of("llama", num_hidden_layers=4)
    counts = {}
    for how in ("none", "selective", 2, "full"):
        if how != "none":
            checkpoint_activations(model, how)
        with Counted() as counted:
            gradients(model)
        counts[how] = counted.products
    layer = (counts["full"] - counts["none"]) / 4
    assert counts["selective"] == counts["none"]  # no product twice
    assert counts[2] - counts["none"] == 2 * layer > 0


def test_memory_falls_in_the_order_of_what_is_kept() -> None:
    peaks = {}
    for how in ("none", "selective", 2, "full"):
        model = model_of("llama", num_hidden_layers=6)
        gradients(model)
        if how != "none":
            checkpoint_activations(model, how)
        with LiveBytes() as live:
            gradients(model)
        peaks[how] = live.peak
    assert peaks["full"] < peaks[2] < peaks["none"]
    assert peaks["full"] < peaks["selective"] < peaks["none"]


@pytest.mark.parametrize("how", ["full", 2])
def test_inputs_that_were_away_come_back_as_they_were(how: Any) -> None:
    """Twice, so that host memory is used again; and through a graph that is kept."""
    model = model_of("llama", num_hidden_layers=5)
    expected = gradients(model)
    checkpoint_activations(model, how)
    offload_checkpoints(model)
    stores = {
        id(layer._gradient_checkpointing_func.args[0]): layer._gradient_checkpointing_func.args[0]
        for layer in model.model.layers
        if layer.gradient_checkpointing
    }
    (store,) = stores.values()
    store.least_bytes = 1
    for _ in range(3):
        assert_equal(gradients(model), expected)
        assert store._away == []
    buffers = [m.data_ptr() for free in store._free.values() for m in free]
    assert len(buffers) == len(set(buffers)) == (5 if how == "full" else 3)


def test_only_activations_go_away() -> None:
    store = HostStore(least_bytes=8)
    weight = torch.nn.Parameter(torch.ones(100))
    for stays in (weight, torch.arange(100), torch.ones(1), torch.ones(100, requires_grad=True)):
        assert store.pack(stays) is stays
    activation = weight * 2
    away = store.pack(activation)
    assert away is not activation
    assert torch.equal(store.unpack(away), activation)


def test_nothing_to_send_away_is_said() -> None:
    with pytest.raises(RecipeError, match="no activations are checkpointed"):
        offload_checkpoints(model_of("llama"))


@pytest.mark.parametrize("tokens", [5, 16, 47, 48, 1000])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_tiled_mlps_give_the_same_gradients(kind: str, tokens: int) -> None:
    model = model_of(kind)
    expected = gradients(model)
    assert tile_mlps(model, tokens=tokens) == model.config.num_hidden_layers
    assert_equal(gradients(model), expected)
    checkpoint_activations(model, "full")
    assert_equal(gradients(model), expected)


def test_a_frozen_mlp_passes_gradients_on() -> None:
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    expected = gradients(model)
    tile_mlps(model, tokens=16)
    assert_equal(gradients(model), expected)


def test_pieces_draw_the_same_dropout_again() -> None:
    """The backward computes what the forward did, and the generator goes on as if nothing had been."""
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Sequential(
        torch.nn.Linear(8, 32), torch.nn.Dropout(0.5), torch.nn.GELU(), torch.nn.Linear(32, 8)
    ).double()
    plain = layer.mlp.forward
    hidden = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    tile_mlps(layer, tokens=4)
    torch.manual_seed(3)
    found = layer.mlp(hidden)
    after = torch.get_rng_state()
    found.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    own, hidden.grad = hidden.grad, None
    weights = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    torch.manual_seed(3)
    pieces = torch.cat([plain(piece) for piece in hidden.chunk(3, dim=1)], dim=1)
    torch.testing.assert_close(pieces, found)
    pieces.square().sum().backward()
    torch.testing.assert_close(own, hidden.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(weights[name], parameter.grad)


def test_gradients_of_bf16_weights_are_rounded_once() -> None:
    """64 pieces, each of whose sums would be rounded where they were added up in bf16."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Sequential(
        torch.nn.Linear(16, 64, bias=False), torch.nn.GELU(), torch.nn.Linear(64, 16, bias=False)
    ).bfloat16()
    hidden = torch.randn(1, 64, 16).bfloat16()
    exact = {}
    for piece in hidden.chunk(64, dim=1):
        layer.mlp(piece).sum().backward()
        for name, parameter in layer.named_parameters():
            exact[name] = exact.get(name, 0) + parameter.grad.double()
            parameter.grad = None
    tile_mlps(layer, tokens=1)
    layer.mlp(hidden).sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.grad, exact[name].float().bfloat16()), name


def test_a_piece_is_all_that_is_held() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Sequential(
        torch.nn.Linear(8, 512), torch.nn.GELU(), torch.nn.Linear(512, 8)
    )
    tile_mlps(layer, tokens=16)
    peaks = []
    for length in (256, 2048):
        hidden = torch.randn(1, length, 8, requires_grad=True)
        with LiveBytes() as live:
            layer.mlp(hidden).sum().backward()
        peaks.append(live.peak - 3 * hidden.nbytes)
    assert peaks[1] <= peaks[0] + 1024


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="experts"):
        tile_mlps(model_of("mixtral"))
