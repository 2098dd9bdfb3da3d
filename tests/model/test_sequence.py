"""Models whose attention ranks can share: what a rank alone can tell of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from arctic_like.errors import RecipeError
from arctic_like.model import sequence
from arctic_like.model.isolation import packed_inputs
from arctic_like.sequence import SequenceGroup, borders_of

from .shapes import GPT2, LLAMA, MIXTRAL, SIZES, make

MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 2}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 5}
POSITIONS = torch.tensor([[*range(4), *range(9)], [*range(13)]])
TOKENS = (POSITIONS * 7 + 3) % 262
ALONE = SequenceGroup()


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**inputs).logits
    return found


@pytest.mark.parametrize(
    ("shape", "attention"),
    [(LLAMA, "sdpa"), (LLAMA, "eager"), (GPT2, "sdpa"), (MIXTRAL, "sdpa"), (MISTRAL, "sdpa"),
     (MISTRAL, "eager"), (GEMMA2, "eager")],
    ids=lambda value: value if isinstance(value, str) else value["model_type"],
)  # fmt: skip
def test_borders_in_place_of_a_mask_give_the_same_logits(
    shape: dict[str, Any], attention: str
) -> None:
    """Packed rows, windows too; and any other call stays as it was."""
    model = make(shape, attn_implementation=attention)
    plain = packed_inputs(model, TOKENS, POSITIONS)
    expected = logits(model, plain)
    sequence.share_attention(model, ALONE)
    assert model.config._attn_implementation == f"ulysses_{attention}"
    assert torch.equal(logits(model, plain), expected)
    shared = sequence.shared_inputs(model, TOKENS, POSITIONS, borders_of(POSITIONS))
    assert torch.allclose(logits(model, shared), expected, atol=1e-5)
    # documents that run into each other are something else
    together = sequence.shared_inputs(
        model, TOKENS, POSITIONS, torch.tensor([0, 13, 26], dtype=torch.int32)
    )
    assert not torch.allclose(logits(model, together), expected, atol=1e-3)


def flash(
    _: Any, q: Any, k: Any, v: Any, mask: Any, *, scaling: float, sliding_window: int | None,
    cu_seq_lens_q: Any, cu_seq_lens_k: Any, max_length_q: int, max_length_k: int, **rest: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What variable-length flash attention computes: one batch row, documents end to end."""
    assert mask is None
    assert q.shape[0] == 1
    assert cu_seq_lens_q is cu_seq_lens_k
    assert max_length_q == max_length_k == 13
    assert set(rest) <= {"dropout", "softcap"}
    found = []
    for first, last in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        mine = [x[:, :, first:last] for x in (q, k, v)]
        place = torch.arange(last - first)
        seen = place[:, None] >= place
        if sliding_window is not None:
            seen &= place[:, None] - place < sliding_window
        found.append(F.scaled_dot_product_attention(*mine, seen, scale=scaling, enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("shape", [LLAMA, MISTRAL], ids=["llama", "mistral"])
def test_flash_attention_gets_rows_end_to_end(
    shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the kernel, which needs CUDA."""
    model = make(shape)
    expected = logits(model, packed_inputs(model, TOKENS, POSITIONS))
    monkeypatch.setattr(sequence, "_core", lambda core, module: flash)
    model.config._attn_implementation_internal = sequence._registered("flash_attention_2", ALONE)
    shared = sequence.shared_inputs(model, TOKENS, POSITIONS, borders_of(POSITIONS))
    assert shared["input_ids"].shape == (2, 13)
    assert torch.allclose(logits(model, shared), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "words"),
    [
        ({"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}, 2,
         "gptj has an attention of its own"),
        ({**SIZES, "model_type": "bloom"}, 2, "bloom cannot be shared"),
        ({**SIZES, "model_type": "mamba"}, 2, "mamba cannot be shared"),
        (LLAMA, 3, "4 attention heads cannot be shared among 3 ranks"),
    ],
    ids=["gptj", "bloom", "mamba", "heads"],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_by_name(
    shape: dict[str, Any], size: int, words: str
) -> None:
    shape = {
        k: v for k, v in shape.items() if k != "num_attention_heads" or "mamba" not in str(shape)
    }
    options = {"attn_implementation": "eager"} if shape["model_type"] in ("gptj", "bloom") else {}
    model = make(shape, disable_activation_checkpoint=True, **options)
    with pytest.raises(RecipeError, match=words):
        sequence.share_attention(model, SequenceGroup(rank=0, size=size))


def test_a_layer_that_hides_its_window_is_refused() -> None:
    """As models that mask chunks of a row, and say so to nobody."""
    model = make({**LLAMA, "model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True,
                  "num_key_value_heads": 2,
                  "layer_types": ["full_attention", "sliding_attention"]})  # fmt: skip
    sequence.share_attention(model, ALONE)
    shared = sequence.shared_inputs(model, TOKENS, POSITIONS, borders_of(POSITIONS))
    logits(model, shared)
    model.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(RecipeError, match="layer 1"):
        logits(model, shared)
