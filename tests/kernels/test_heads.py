"""Models' heads called by themselves: the models' own logits, losses and gradients; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from arctic_like.errors import RunError
from arctic_like.kernels.linear_loss import linear_cross_entropy_sum, linear_log_probs
from arctic_like.kernels.tiles import Logits
from arctic_like.model.heads import LinearHead, find_head, gathered, through_head
from arctic_like.model.isolation import packed_inputs

COMMON = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
MODELS: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "llama": ({}, 1.0, None),
    "qwen3": ({"tie_word_embeddings": True}, 1.0, None),
    "gemma2": ({"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}, 1.0, 30.0),
    "cohere": ({"logit_scale": 0.0625}, 0.0625, None),
    "granite": ({"logits_scaling": 6.0}, 1 / 6, None),
    "gpt2": (GPT2, 1.0, None),
    "phi": ({}, 1.0, None),
    "gpt_neox": ({}, 1.0, None),
}
"""Name → (shape, the scale and the cap that its page of transformers says)."""


def make(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A small random model whose head is large enough for a cap to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, **MODELS.get(name, ({},))[0], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)
    return model.eval()


def inputs(model: Any, rows: int = 2, length: int = 12) -> dict[str, Any]:
    torch.manual_seed(1)
    places = torch.arange(length).expand(rows, length)
    return packed_inputs(model, torch.randint(3, 64, (rows, length)), places % 7)


def head_of(model: Any) -> LinearHead:
    found = find_head(model, device="cpu")
    assert found.head is not None, found.reason
    return found.head


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    head = head_of(model)
    _, scale, softcap = MODELS[name]
    assert head.scale == pytest.approx(scale, rel=1e-12)
    assert head.softcap == softcap
    given = inputs(model)
    with torch.no_grad():
        true = model(**given).logits.flatten(0, 1)
        (found,) = through_head(
            head, lambda: model(**given), lambda h, own: (Logits(own, len(h)).of(h).clone(),)
        )
    assert found.shape == true.shape
    if softcap:
        assert float(true.abs().max()) > softcap / 2, "the cap must matter"
    size, relative = float(true.abs().max()), 1e-10 if dtype == torch.float64 else 2**-6
    assert float((found - true).abs().max()) < relative * size


def tiled(model: Any, head: LinearHead, given: dict[str, Any], targets: Any) -> torch.Tensor:
    def compute(hidden: Any, own: Any) -> tuple[torch.Tensor, ...]:
        found = linear_cross_entropy_sum(
            hidden, own.weight, targets, bias=own.bias, scale=own.scale, softcap=own.softcap,
            low=own.low, tile=5,
        )  # fmt: skip
        return found.total, found.losses

    return through_head(head, lambda: model(**given), compute)[0]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_are_the_models_own(name: str) -> None:
    model = make(name)
    head, given = head_of(model), inputs(model)
    targets = given["input_ids"].flatten().roll(-1)
    targets[::3] = -100
    logits = model(**given).logits
    F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").backward()
    true = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    tiled(model, head, given, targets).backward()
    assert len(true) > 10
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        apart = float((parameter.grad - true[key]).norm())
        assert apart <= 1e-9 * float(true[key].norm()) + 1e-12, key


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    for key, parameter in wrapped.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter)
    return wrapped.double()


HEAD_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "of rank-stabilised scale": (
        "llama", {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 7}
    ),
    "tied, scaled": ("qwen3", {"target_modules": ["lm_head", "v_proj"], "lora_alpha": 3}),
    "capped": ("gemma2", {"target_modules": ["lm_head"]}),
    "with dropout": ("llama", {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.5}),
    "a copy": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}  # fmt: skip


@pytest.mark.parametrize("each", [False, True], ids=["sum", "each token"])
@pytest.mark.parametrize("kind", HEAD_ADAPTERS)
def test_an_adapter_of_the_head_is_trained_as_peft_trains_it(kind: str, each: bool) -> None:
    name, options = HEAD_ADAPTERS[kind]
    model = lora(make(name), **options)
    head, given = head_of(model), inputs(model)
    model.train()
    targets = given["input_ids"].flatten().roll(-1)
    targets[::3] = -100

    def losses() -> torch.Tensor:
        if not each:
            return tiled(model, head, given, targets)

        def compute(hidden: Any, own: Any) -> tuple[torch.Tensor, ...]:
            found = linear_log_probs(
                hidden, own.weight, targets, bias=own.bias, scale=own.scale,
                softcap=own.softcap, low=own.low, tile=5,
            )  # fmt: skip
            return (found,)

        return -through_head(head, lambda: model(**given), compute)[0].sum()

    torch.manual_seed(3)
    true_loss = F.cross_entropy(model(**given).logits.flatten(0, 1), targets, reduction="sum")
    true_loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    true = {key: p.grad.clone() for key, p in trained.items()}  # type: ignore[union-attr]
    model.zero_grad()
    torch.manual_seed(3)
    loss = losses()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(true_loss.detach()), rel=1e-10)
    assert any("lm_head" in key for key in trained)
    for key, parameter in trained.items():
        assert parameter.grad is not None, key
        apart = float((parameter.grad - true[key]).norm())
        assert apart <= 1e-9 * float(true[key].norm()) + 1e-12, key

    model.eval()
    with model.disable_adapter(), torch.no_grad():  # DPO's reference
        base = F.cross_entropy(model(**given).logits.flatten(0, 1), targets, reduction="sum")
        assert float(losses()) == pytest.approx(float(base), rel=1e-10)
    assert float(base) != pytest.approx(float(true_loss.detach()), rel=1e-3)
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.parametrize("whole_head", [False, True])
def test_adapters_elsewhere_leave_the_head_as_it_is(whole_head: bool) -> None:
    options = {"modules_to_save": ["lm_head"]} if whole_head else {}
    model = lora(make("llama"), target_modules=["q_proj", "v_proj"], **options)
    head, given = head_of(model), inputs(model)
    targets = given["input_ids"].flatten().roll(-1)
    assert head.parts.linear.weight.requires_grad == whole_head
    F.cross_entropy(model(**given).logits.flatten(0, 1), targets, reduction="sum").backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    true = {key: p.grad.clone() for key, p in trained.items()}  # type: ignore[union-attr]
    model.zero_grad()
    tiled(model, head, given, targets).backward()
    for key, parameter in trained.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, true[key], rtol=1e-9, atol=1e-12), key
    assert len(trained) == 8 + whole_head


def test_the_model_is_as_it_was() -> None:
    model = make("gemma2").train()
    model.model.layers[0].eval()
    state, modes = torch.get_rng_state(), [part.training for part in model.modules()]
    head = head_of(SimpleNamespace(module=model))  # as an engine wraps it
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [part.training for part in model.modules()]
    assert "forward" not in vars(head.module)
    assert not head.module._forward_hooks
    with pytest.raises(ZeroDivisionError):
        through_head(head, lambda: model(**inputs(model)), lambda *_: (1 / 0,))  # type: ignore[arg-type]
    assert "forward" not in vars(head.module)
    assert not head.module._forward_hooks
    with gathered(head) as whole:
        assert torch.equal(whole.weight, model.lm_head.weight)
        assert not whole.weight.requires_grad


def test_hooks_of_the_head_see_what_has_a_gradient() -> None:
    # ZeRO-3 wraps outputs in a hook, to know when a backward reaches the module
    model, order = make("llama"), []
    head = head_of(model)

    def wrap(_: Any, __: Any, output: Any) -> Any:
        order.append("forward")
        (loss,) = output
        loss = loss * 1
        loss.register_hook(lambda gradient: order.append("backward"))
        return (loss,)

    model.lm_head.register_forward_hook(wrap)
    given = inputs(model)
    loss = tiled(model, head, given, given["input_ids"].flatten())
    order.append("loss")
    loss.backward()
    assert order == ["forward", "loss", "backward"]


def changed(model: Any, after: Callable[[Any], Any]) -> Any:
    """The model with something done to its logits."""
    inner = model.forward

    def forward(**given: Any) -> Any:
        output = inner(**given)
        output.logits = after(output.logits)
        return output

    model.forward = forward
    return model


def twice() -> Any:
    model = make("llama")
    inner = model.forward

    def forward(**given: Any) -> Any:
        model.lm_head(torch.zeros(1, 1, 16, dtype=torch.float64))
        return inner(**given)

    model.forward = forward
    return model


def functional() -> Any:
    """A model that multiplies by its head's weight without calling the head."""
    model = make("llama")

    def forward(input_ids: Any, position_ids: Any, use_cache: bool = False) -> Any:
        hidden = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        return SimpleNamespace(logits=F.linear(hidden.last_hidden_state, model.lm_head.weight))

    model.forward = forward
    return model


class OwnLinear(nn.Linear):
    def forward(self, given: Any) -> Any:
        return super().forward(given) + 1


def own_head() -> Any:
    model = make("llama")
    model.lm_head = OwnLinear(16, 64, dtype=torch.float64)
    return model


def mask_some(logits: Any) -> Any:
    logits = logits.clone()
    logits[..., 5] = -1e4
    return logits


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "shifted": (lambda: changed(make("llama"), lambda x: x + 0.01), "neither"),
    "squared": (lambda: changed(make("llama"), lambda x: x * x.abs()), "neither"),
    "masked": (lambda: changed(make("llama"), mask_some), "neither"),
    "normalised": (lambda: changed(make("llama"), lambda x: x - x.mean(-1, keepdim=True)), "neither"),
    "cut": (lambda: changed(make("llama"), lambda x: x[..., :60]), "shape"),
    "another cap": (lambda: changed(make("llama"), lambda x: x.clamp(-30, 30)), "neither"),
    "called twice": (twice, "2 times"),
    "not called": (functional, "0 times"),
    "own head": (own_head, "no plain linear layer"),
    "no language model": (lambda: nn.Linear(2, 2), "what its head is"),
    "adapter of another kind": (
        lambda: lora(make("llama"), target_modules=["lm_head"], use_dora=True), "DoraLinearVariant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_are_not_known_to_be_exact_are_refused(name: str) -> None:
    model, reason = REFUSED[name][0](), REFUSED[name][1]
    found = find_head(model, device="cpu")
    assert found.head is None
    assert reason in found.reason


def test_a_cap_behind_a_scale_is_found() -> None:
    model = changed(make("llama"), lambda x: 7 * torch.tanh(x * 0.3 / 7))
    head = head_of(model)
    assert (head.scale, head.softcap) == (pytest.approx(0.3, rel=1e-12), pytest.approx(7))


def test_a_model_that_stops_calling_its_head_is_an_error() -> None:
    model = make("llama")
    with pytest.raises(RunError, match="called 0 times"):
        through_head(head_of(model), lambda: None, lambda h, own: (h,))
