"""Attention on CUDA against eager attention, document by document: kernels, windows, gradients, choice."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.stop import StopRequest
from tests.integration.tools import recipe, train_lines, write_conversations, write_recipe
from tests.model.shapes import LLAMA, make

pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **SIZES},
    "mistral": {**LLAMA, **SIZES, "model_type": "mistral", "sliding_window": 37},
    "gemma3": {
        **LLAMA, **SIZES, "model_type": "gemma3_text", "head_dim": 64, "sliding_window": 37,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "wide": {**LLAMA, **SIZES, "head_dim": 256},
    "odd": {**LLAMA, **SIZES, "head_dim": 36},
}  # fmt: skip
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
ENDS = [0, 3, 130, 131, 300, 420, 600]


@pytest.fixture(autouse=True)
def device() -> str:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


def rows() -> tuple[Any, Any]:
    """Two rows of 300 tokens: documents of 1 to 180, one border at the rows' own."""
    import torch

    positions = torch.cat([torch.arange(last - first) for first, last in pairwise(ENDS)])
    tokens = (torch.arange(600) * 7 + positions * 5 + 3) % 262
    return tokens.view(2, 300).cuda(), positions.view(2, 300).cuda()


def gradient(model: Any, logits: Any) -> Any:
    """The gradient of the layers' attention weights under a fixed, uneven loss."""
    import torch

    model.zero_grad()
    weights = torch.linspace(-3, 3, logits.numel(), device=logits.device).cos().view_as(logits)
    (logits.float() * weights).sum().backward()
    found = [p.grad.float().flatten() for n, p in model.named_parameters() if "_proj" in n]
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["varlen", "sdpa", "flex_attention", *PACKAGES])
@pytest.mark.parametrize("name", SHAPES)
def test_packed_rows_are_the_documents_alone(name: str, kind: str) -> None:
    """bf16 against float32, as near as eager attention in bf16 comes to it, within a factor."""
    import torch

    from arctic_like.model.isolation import check_isolation, packed_inputs

    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
    tokens, positions = rows()
    exact = make(SHAPES[name], dtype="fp32", attn_implementation="eager").cuda().train()
    documents = [
        exact(input_ids=tokens.flatten()[None, first:last], use_cache=False).logits[0]
        for first, last in pairwise(ENDS)
    ]
    expected = torch.cat(documents)
    expected_gradient = gradient(exact, expected)

    def errors(kind: str) -> tuple[float, float]:
        model = make(SHAPES[name], dtype="bf16", attn_implementation=kind).cuda().train()
        check_isolation(model, vocab_size=262, device="cuda")
        logits = model(**packed_inputs(model, tokens, positions)).logits.view(600, -1)
        found = gradient(model, logits)
        return (
            float((logits.float() - expected).norm() / expected.norm()),
            float((found - expected_gradient).norm() / expected_gradient.norm()),
        )

    mine, eager = errors(kind), errors("eager")
    assert mine[0] < 2 * eager[0] + 1e-3
    assert mine[1] < 2 * eager[1] + 1e-3


@pytest.mark.parametrize("name", SHAPES)
def test_the_check_before_the_run_passes(name: str) -> None:
    from arctic_like.model.attention import check_varlen

    model = make(SHAPES[name], dtype="bf16", attn_implementation="varlen").cuda()
    assert check_varlen(model, vocab_size=262, device="cuda") is None


def test_nothing_waits_for_the_device_where_borders_are_known() -> None:
    import torch

    from arctic_like.model.isolation import packed_inputs
    from arctic_like.sequence import borders_of

    model = make(SHAPES["mistral"], dtype="bf16", attn_implementation="varlen").cuda()
    tokens, positions = rows()
    borders = borders_of(positions.cpu()).cuda()
    for strict in (False, True):  # the first call loads kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            inputs = packed_inputs(model, tokens, positions, borders=borders)
            model(**inputs).logits.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_varlen_and_trains_as_sdpa(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=40)
    content = recipe(
        data, train_iters=6, micro_batch_size=2, model__dtype="bf16", model__config=SHAPES["llama"],
        device="cuda",
    )  # fmt: skip
    found, taken = {}, {}
    for kind in ("auto", "sdpa"):
        path = write_recipe(tmp_path / f"{kind}.yaml", content)

        def look(trainer: Any, kind: str = kind) -> None:
            taken[kind] = trainer.module.config._attn_implementation

        execute(
            load_recipe(path, [f"model.attn_implementation={kind}"]), output_dir=tmp_path / kind,
            resume="", stop=StopRequest(), inspect=look,
        )  # fmt: skip
        found[kind] = [line["loss"] for line in train_lines(tmp_path / kind)]
    assert taken["auto"] in ("varlen", "flash_attention_3", "flash_attention_4")
    assert found["auto"] == pytest.approx(found["sdpa"], rel=2e-2)


@pytest.mark.parametrize("kind", ["varlen", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_layers_compute_what_they_do_as_written(name: str, kind: str) -> None:
    """Inductor rounds bf16 less often than layer by layer."""
    import torch

    from arctic_like.model.isolation import packed_inputs

    tokens, positions = rows()

    def both(**options: Any) -> tuple[Any, Any]:
        model = make(SHAPES[name], dtype="bf16", attn_implementation=kind, **options).cuda()
        logits = model(**packed_inputs(model, tokens, positions)).logits
        return logits.detach().float(), gradient(model, logits)

    torch._dynamo.reset()
    for found, expected in zip(both(compile="blocks"), both(), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 3e-2
