"""`varlen` attention, with a plain reference in the kernel's place: it needs CUDA; and what `auto` takes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from arctic_like.errors import RecipeError
from arctic_like.model import attention
from arctic_like.model.attention import attention_of, check_varlen, varlen_attention
from arctic_like.model.attention_choice import AttentionFacts, choose
from arctic_like.model.embedding import EmbeddingModelConfig, EmbeddingModelFactory
from arctic_like.model.isolation import check_isolation, packed_inputs
from arctic_like.sequence import borders_of
from arctic_like.world import World

from .shapes import GPT2, LLAMA, MIXTRAL, SIZES, byte_tokenizer, make

GROUPED = {**LLAMA, "num_key_value_heads": 2}
MISTRAL = {**GROUPED, "model_type": "mistral", "sliding_window": 5}
GEMMA3 = {
    **GROUPED, "model_type": "gemma3_text", "head_dim": 12, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
GEMMA2 = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "sliding_window": 5}
SHAPES = {"llama": GROUPED, "gpt2": GPT2, "mixtral": MIXTRAL, "mistral": MISTRAL, "gemma3": GEMMA3}
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"hf_config_kwargs": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
}
POSITIONS = torch.tensor([[*range(4), *range(1), *range(8)], [*range(2), *range(11)]])
TOKENS = (POSITIONS * 7 + torch.arange(13) * 5 + 3) % 262
BORDERS = [0, 4, 5, 13, 15, 26]


class Kernel:
    """What torch's function of this name computes, document by document, score by score."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int,
        *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert query.shape[2] % 8 == 0
        assert (query.shape[1] != key.shape[1]) == enable_gqa
        assert cu_seq_q.dtype == torch.int32
        self.calls.append(
            {"borders": cu_seq_q.tolist(), "longest": (max_q, max_k), "scale": scale,
             "window": window_size, "shape": tuple(query.shape)}
        )  # fmt: skip
        times = query.shape[1] // key.shape[1]
        found = torch.empty_like(query)
        left, right = window_size
        assert right == 0, "causal"
        for (first, last), other in zip(
            pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
        ):
            assert (first, last) == other
            assert last - first <= max_q
            assert scale is not None
            for head in range(query.shape[1]):
                mine = [
                    x[first:last, h]
                    for x, h in ((query, head), (key, head // times), (value, head // times))
                ]
                ago = torch.arange(last - first)[:, None] - torch.arange(last - first)
                hidden = (ago < 0) | ((ago > left) if left >= 0 else False)
                scores = (mine[0] @ mine[1].T * scale).masked_fill(hidden, -torch.inf)
                found[first:last, head] = scores.softmax(-1) @ mine[2]
        return found


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel()
    monkeypatch.setattr(attention, "_usable", lambda query: True)
    monkeypatch.setattr(attention, "_found_kernel", lambda: found)
    return found


def document_by_document(model: Any) -> torch.Tensor:
    """The logits of every document, called alone and by the eager attention."""
    found = torch.empty(26, 262, dtype=torch.float64)
    for first, last in pairwise(BORDERS):
        document = TOKENS.flatten()[None, first:last]
        found[first:last] = model(input_ids=document, use_cache=False).logits[0]
    return found.view(2, 13, 262)


def gradients(model: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights.cos()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SHAPES)
def test_packed_rows_are_computed_document_by_document(name: str, kernel: Kernel) -> None:
    """With gradients, through checkpointed layers, windows and shared key heads. In float64, but for what
    transformers computes in float32 whatever it is given: norms, eager softmax."""
    model = make(SHAPES[name], attn_implementation="varlen", **NO_DROPOUT.get(name, {}))
    plain = make(SHAPES[name], attn_implementation="eager", disable_activation_checkpoint=True)
    plain.eval()
    if name != "mixtral":  # whose experts know no float64
        model, plain = model.double(), plain.double()
    packed = model(**packed_inputs(model, TOKENS, POSITIONS)).logits
    assert len(kernel.calls) == 2
    expected = document_by_document(plain)
    assert torch.allclose(packed, expected.to(packed.dtype), atol=1e-6)
    found, alone = gradients(model, packed), gradients(plain, expected)
    assert found.keys() == alone.keys()
    for key, grad in alone.items():
        assert (found[key] - grad).norm() <= 1e-5 * grad.norm(), key
    assert len(kernel.calls) == 4, "computed again in the backward"
    assert all(call["borders"] == BORDERS for call in kernel.calls)
    assert all(call["longest"] == (13, 13) for call in kernel.calls)


def test_windows_and_widths_as_the_kernel_wants_them(kernel: Kernel) -> None:
    model = make(GEMMA3, attn_implementation="varlen").eval()
    model(**packed_inputs(model, TOKENS, POSITIONS))
    assert [call["window"] for call in kernel.calls] == [(4, 0), (-1, 0)]
    assert {call["shape"] for call in kernel.calls} == {(26, 4, 16)}, "12 is padded to 16"


def test_values_of_another_width(kernel: Kernel) -> None:
    """As with latent attention, where they are narrower than queries and keys; the scale is the queries'."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 13, 20), torch.randn(2, 2, 13, 20)
    value = torch.randn(2, 2, 13, 10)
    layer = torch.nn.Module()
    layer.config, layer.num_key_value_groups = object(), 2  # type: ignore[assignment]
    mask = attention.as_mask(borders_of(POSITIONS))
    found = varlen_attention(layer, query, key, value, mask)[0]
    assert found.shape == (2, 13, 4, 10)
    assert kernel.calls[0]["scale"] == 20**-0.5
    kernel.calls.clear()
    # a mask of every pair of places, and torch's own attention
    documents = torch.tensor([[0] * 4 + [1] + [2] * 8, [3] * 2 + [4] * 11])
    seen = (documents[:, None, :, None] == documents[:, None, None]) & torch.ones(
        13, 13
    ).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, seen, enable_gqa=True
    )
    assert not kernel.calls
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


def test_a_kernel_without_shared_key_heads_gets_them_repeated(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel
) -> None:
    """torch 2.11: scale and window, but as many key heads as query heads."""
    model = make(GROUPED, attn_implementation="varlen").eval()
    expected = model(**packed_inputs(model, TOKENS, POSITIONS)).logits

    def older(q: Any, k: Any, v: Any, *rest: Any, scale: Any, window_size: Any) -> torch.Tensor:
        assert q.shape == k.shape == v.shape
        return kernel(q, k, v, *rest, scale=scale, window_size=window_size)

    monkeypatch.setattr(attention, "_found_kernel", lambda: attention.repeating(older))
    found = model(**packed_inputs(model, TOKENS, POSITIONS)).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_the_installed_kernel_has_the_arguments_that_it_is_given() -> None:
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    assert attention.available()
    mine = inspect.signature(Kernel.__call__).parameters.keys() - {"self"}
    theirs = inspect.signature(varlen_attn).parameters.keys()
    assert mine - {"enable_gqa"} <= theirs
    # torch 2.11 wants as many key heads as query heads: `repeating` is tested above
    assert (attention._found_kernel() is varlen_attn) == ("enable_gqa" in theirs)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_where_there_is_no_kernel_a_mask_gives_the_same(name: str) -> None:
    model = make(SHAPES[name], attn_implementation="varlen").double().eval()
    found = model(**packed_inputs(model, TOKENS, POSITIONS)).logits
    plain = make(SHAPES[name], attn_implementation="eager").double().eval()
    assert torch.allclose(found, document_by_document(plain), atol=1e-6)


def test_borders_that_are_known_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LLAMA, attn_implementation="varlen")
    borders = borders_of(POSITIONS)
    assert packed_inputs(model, TOKENS, POSITIONS)["attention_mask"].flatten().tolist() == BORDERS
    from arctic_like.model import isolation

    monkeypatch.setattr(isolation, "borders_of", lambda positions: pytest.fail("waits"))
    given = packed_inputs(model, TOKENS, POSITIONS, borders=borders)["attention_mask"]
    assert given.shape == (1, 1, 1, 6)
    assert "attention_mask" not in packed_inputs(make(LLAMA), TOKENS, POSITIONS, borders=borders)


def test_calls_without_borders_are_plain_sdpa(kernel: Kernel) -> None:
    """Generation with a cache, a padded batch with a mask, positions alone."""
    model = make(MISTRAL, attn_implementation="varlen").eval()
    plain = make(MISTRAL, attn_implementation="sdpa").eval()
    padding = torch.ones_like(TOKENS)
    padding[1, 9:] = 0
    for call in (
        {"position_ids": POSITIONS, "use_cache": False},
        {"attention_mask": padding},
        {"use_cache": True},
    ):
        with torch.no_grad():
            assert torch.equal(
                model(input_ids=TOKENS, **call).logits, plain(input_ids=TOKENS, **call).logits
            )
    sampling = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(TOKENS, **sampling), plain.generate(TOKENS, **sampling))
    assert not kernel.calls


def test_the_check_before_the_run(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(MISTRAL, attn_implementation="varlen", dtype="fp32")
    assert check_varlen(model, vocab_size=262, device="cpu") is None
    check_isolation(model, vocab_size=262, device="cpu")
    assert model.training

    def joined(q: Any, k: Any, v: Any, borders: Any, _: Any, *rest: Any, **options: Any) -> Any:
        whole = borders[[0, -1]]
        return kernel(q, k, v, whole, whole, int(whole[1]), int(whole[1]), **options)

    monkeypatch.setattr(attention, "_found_kernel", lambda: joined)
    assert "off those of sdpa" in str(check_varlen(model, vocab_size=262, device="cpu"))

    def windowless(*given: Any, window_size: Any, **options: Any) -> Any:
        return kernel(*given, window_size=(-1, 0), **options)

    monkeypatch.setattr(attention, "_found_kernel", lambda: windowless)
    assert "off those of sdpa" in str(check_varlen(model, vocab_size=262, device="cpu"))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_what_the_kernel_cannot_honour_is_refused(option: str) -> None:
    heads = torch.randn(2, 4, 13, 8)
    layer = torch.nn.Module()
    layer.config = object()  # type: ignore[assignment]
    mask = attention.as_mask(borders_of(POSITIONS))
    with pytest.raises(RecipeError, match=option):
        varlen_attention(layer, heads, heads, heads, mask, **{option: torch.ones(1)})


def test_models_that_cannot_have_it_are_refused() -> None:
    for given in ("varlen", "sdpa"):
        with pytest.raises(RecipeError, match=r"attn_implementation"):
            make(GEMMA2, attn_implementation=given)
    embedding = EmbeddingModelConfig.model_validate(
        {"type": "embedding", "dtype": "fp32", "config": LLAMA, "attn_implementation": "varlen"}
    )
    with pytest.raises(RecipeError, match="given a mask"):
        EmbeddingModelFactory(embedding).build(
            tokenizer=byte_tokenizer(), seed=0, world=World(), device="cpu", zero_stage=0, ds_config={}
        )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(LLAMA, "sdpa"), (GPT2, "sdpa"), (GEMMA2, "eager"), ({**SIZES, "model_type": "bloom"}, "eager")],
    ids=["llama", "gpt2", "gemma2", "bloom"],
)  # fmt: skip
def test_auto_on_a_cpu_is_what_transformers_takes(shape: dict[str, Any], expected: str) -> None:
    shape = {"n_head": 4, **shape} if shape["model_type"] == "bloom" else shape
    assert attention_of(make(shape, attn_implementation="auto")) == expected
    assert attention_of(make(shape)) == expected


HOPPER = {"device": "cuda:0", "capability": (9, 0), "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("facts", "implementation", "words"),
    [
        ({}, "sdpa", "need CUDA"),
        ({"fallback": "eager"}, "eager", "need CUDA"),
        (HOPPER, "varlen", "document by document"),
        ({**HOPPER, "dtype": "float16"}, "varlen", "document by document"),
        ({**HOPPER, "dtype": "float32"}, "sdpa", "float32"),
        ({**HOPPER, "capability": (7, 5)}, "sdpa", "8.0"),
        ({**HOPPER, "packages": frozenset({2})}, "varlen", "document by document"),
        ({**HOPPER, "packages": frozenset({2, 3})}, "flash_attention_3", "written for this device"),
        ({**HOPPER, "packages": frozenset({4})}, "varlen", "document by document"),
        ({**HOPPER, "packages": frozenset({3, 4}), "capability": (10, 0)}, "flash_attention_4", "written"),
        ({**HOPPER, "packages": frozenset({3}), "flash": False}, "varlen", "document by document"),
        ({**HOPPER, "packages": frozenset({3}), "capability": (8, 0)}, "varlen", "document by document"),
        ({**HOPPER, "varlen": False}, "sdpa", "no such kernel"),
        ({**HOPPER, "varlen": False, "packages": frozenset({2})}, "flash_attention_2", "no such kernel"),
        ({**HOPPER, "softcap": True, "fallback": "eager"}, "eager", "caps its attention scores"),
        ({**HOPPER, "softcap": True, "packages": frozenset({2})}, "flash_attention_2", "caps"),
        ({**HOPPER, "dropout": 0.1}, "sdpa", "dropout"),
        ({**HOPPER, "dropout": 0.1, "packages": frozenset({2, 3})}, "flash_attention_2", "dropout"),
        ({**HOPPER, "shared": True}, "sdpa", "ranks share rows"),
        ({**HOPPER, "shared": True, "packages": frozenset({2})}, "flash_attention_2", "share"),
        ({**HOPPER, "head_dim": 512}, "sdpa", "512"),
        ({**HOPPER, "head_dim": 256, "packages": frozenset({3})}, "varlen", "document by document"),
        ({**HOPPER, "replaceable": False}, "sdpa", "by name"),
        ({**HOPPER, "virtual_tokens": True, "packages": frozenset({2})}, "sdpa", "virtual tokens"),
        ({**HOPPER, "borders": False, "packages": frozenset({2})}, "sdpa", "padded texts"),
        ({**HOPPER, "fallback": "eager"}, "eager", "no sdpa"),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(facts: dict[str, Any], implementation: str, words: str) -> None:
    found = choose(AttentionFacts(**facts))
    assert found.implementation == implementation
    assert words in found.reason
