"""Adapters: what plain peft makes of the same config and weights, drawn by name, on the right base."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from arctic_like.checkpoint.huggingface import export
from arctic_like.engine import frozen_base
from arctic_like.engine.host import HostGroup
from arctic_like.errors import RecipeError
from arctic_like.inference import load_for_inference
from arctic_like.model.adapters import build
from arctic_like.model.adapters.config import KINDS, keys_of
from arctic_like.model.adapters.fingerprint import difference, fingerprint
from arctic_like.model.adapters.vocabulary import parted
from arctic_like.model.huggingface import HFModelConfig
from arctic_like.model.isolation import check_isolation, packed_inputs, packing_refusal
from arctic_like.optimizer.adam import AdamWConfig, AdamWFactory
from arctic_like.world import World
from tests.model.shapes import GPT2, LLAMA, MAMBA, TIED, byte_tokenizer, make

IDS = (torch.arange(48).view(4, 12) * 37 + 5) % 256
POSITIONS = torch.arange(12).expand(4, 12)
LORA = {"type": "lora", "r": 4, "target_modules": "all-linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": {**LORA, "use_rslora": True, "lora_alpha": 32},
    "dora": {**LORA, "use_dora": True},
    "pissa": {**LORA, "init_lora_weights": "pissa"},
    "oft": {"type": "oft", "oft_block_size": 4, "target_modules": ["q_proj", "down_proj"]},
    "ia3": {"type": "ia3"},
    "saved": {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]},
    "prompt": {"type": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
}
STARTS_AS_BASE = set(CONFIGS) - {"prompt", "prefix"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("base") / "llama", LLAMA)


def pretrained(path: Path, shape: dict[str, Any], *, seed: int = 11) -> Path:
    make(shape, seed=seed).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def plain_peft(folder: Path, config: dict[str, Any], weights: Any) -> Any:
    """What peft itself makes of the config, with the trained weights of another model."""
    own = {key: value for key, value in config.items() if key not in ("type", "peft_type")}
    kind = str(config.get("type", config.get("peft_type"))).upper()
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**own, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**(inputs or {"input_ids": IDS, "use_cache": False})).logits
    return result


def steps(model: Any, forward: Any, *, count: int = 3) -> list[float]:
    """Losses of a bare loop over the trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        out = forward(IDS)[:, :-1]
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_plain_peft_makes(folder: Path, name: str) -> None:
    """Same trainable names, same logits, and the same losses over three steps in a bare loop."""
    config = CONFIGS[name]
    model = make(name_or_path=str(folder), seed=3, peft_config=config)
    weights = trained(model)
    reference = plain_peft(folder, config, weights).train()
    assert set(trained(reference)) == set(weights)
    virtual = config.get("num_virtual_tokens", 0) if name == "prompt" else 0

    def ours(ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = model(**packed_inputs(model, ids, POSITIONS)).logits
        return result

    def theirs(ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = reference(input_ids=ids, use_cache=False).logits[:, virtual:]
        return result

    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=0, atol=1e-6)
        if name in STARTS_AS_BASE:
            base = make(name_or_path=str(folder))
            torch.testing.assert_close(ours(IDS), logits(base), rtol=0, atol=1e-6)
    losses = steps(model, ours)
    assert losses == pytest.approx(steps(reference, theirs), rel=1e-6)
    assert losses[2] < losses[0]


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    state = torch.random.get_rng_state()
    everywhere = trained(make(LLAMA, seed=3, peft_config=LORA))
    some = trained(make(LLAMA, seed=3, peft_config={**LORA, "target_modules": ["up_proj"]}))
    other = trained(make(LLAMA, seed=4, peft_config=LORA))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(some) == 4
    assert all(torch.equal(tensor, everywhere[name]) for name, tensor in some.items())
    drawn = [name for name in everywhere if ".lora_A." in name]
    assert all(not torch.equal(other[name], everywhere[name]) for name in drawn)
    assert len({float(everywhere[name].sum()) for name in drawn}) == len(drawn)
    low = trained(make(LLAMA, seed=3, dtype="bf16", peft_config=LORA))
    assert all(torch.equal(low[name], everywhere[name].bfloat16()) for name in drawn)


def test_only_the_adapter_is_in_the_optimizer() -> None:
    model = make(LLAMA, peft_config=LORA)
    optimizer = AdamWFactory(AdamWConfig()).build(model=model, device="cpu", offload=False)
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in grouped}
    assert len(names) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


def test_loraplus_multiplies_the_rate_of_b() -> None:
    model = make(LLAMA, peft_config={**LORA, "modules_to_save": ["lm_head"]})
    config = AdamWConfig.model_validate({"lr": 1e-3, "loraplus_lr_ratio": 16})
    optimizer = AdamWFactory(config).build(model=model, device="cpu", offload=False)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == 29
    for name, rate in rates.items():
        assert rate == pytest.approx(1.6e-2 if ".lora_B." in name else 1e-3), name
    assert config.replace(learning_rate=1e-4).groups[0].learning_rate == pytest.approx(1.6e-3)


def test_computing_activations_again_changes_no_gradient() -> None:
    gradients = []
    for disable in (True, False):
        model = make(TIED, peft_config=LORA, disable_activation_checkpoint=disable)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.add_(0.1)
        model(IDS, use_cache=False).logits.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(found)
        assert all(".lora_" in name for name in found)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_is_a_folder_for_plain_peft(folder: Path, tmp_path: Path, name: str) -> None:
    """Also PiSSA, which took from the base: over the base as it was it is LoRA of twice the rank."""
    model = make(name_or_path=str(folder), seed=3, peft_config=CONFIGS[name])
    steps(model, lambda ids: model(**packed_inputs(model, ids, POSITIONS)).logits)
    model.eval()
    expected = logits(model, **packed_inputs(model, IDS, POSITIONS))
    for target in ("one", "two"):
        export(model, byte_tokenizer(), directory=tmp_path / target, host=HostGroup(World()))
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == files
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(files)
    assert "config.json" not in files
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == str(folder)
    if name in ("lora", "dora", "pissa"):
        assert config["target_modules"] == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
        assert (config["r"], config["lora_alpha"]) == ((8, 16) if name == "pissa" else (4, 8))
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "one").eval()
    virtual = 3 if name == "prompt" else 0
    found = loaded(input_ids=IDS, use_cache=False).logits[:, virtual:]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    AutoTokenizer.from_pretrained(tmp_path / "one")
    again, _ = load_for_inference(tmp_path / "one")
    torch.testing.assert_close(
        logits(again, **packed_inputs(again, IDS, POSITIONS)), expected, rtol=0, atol=2e-6
    )


def test_training_goes_on_from_an_adapter(folder: Path, tmp_path: Path) -> None:
    """Ours or peft's own; with the weights as they were, trainable, the base frozen."""
    model = make(name_or_path=str(folder), seed=3, peft_config=LORA)
    steps(model, lambda ids: model(ids, use_cache=False).logits)
    export(model, byte_tokenizer(), directory=tmp_path / "ours", host=HostGroup(World()))
    model.save_pretrained(tmp_path / "peft")
    for source in ("ours", "peft"):
        again = make(name_or_path=str(folder), seed=8, adapter=str(tmp_path / source))
        expected, found = trained(model), trained(again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    model = make(name_or_path=str(folder), peft_config=LORA)
    export(model, byte_tokenizer(), directory=tmp_path / "adapter", host=HostGroup(World()))
    other = pretrained(tmp_path / "other", LLAMA, seed=12)
    with pytest.raises(RecipeError, match=r"another base .* other values of model\.embed_tokens"):
        make(name_or_path=str(other), adapter=str(tmp_path / "adapter"))
    gpt2 = pretrained(tmp_path / "gpt2", GPT2)
    with pytest.raises(RecipeError, match=r"another base .* it has no model\.embed_tokens"):
        make(name_or_path=str(gpt2), adapter=str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "base_model.json").unlink()
    with pytest.raises(RecipeError, match=r"another architecture: this gpt2 has no down_proj"):
        make(name_or_path=str(gpt2), adapter=str(tmp_path / "adapter"))
    wide = pretrained(tmp_path / "wide", {**LLAMA, "intermediate_size": 64})
    with pytest.raises(RecipeError, match=r"another architecture: .*size mismatch"):
        make(name_or_path=str(wide), adapter=str(tmp_path / "adapter"))
    with pytest.raises(RecipeError, match=r"no adapter_config\.json"):
        make(name_or_path=str(folder), adapter=str(folder))


def test_the_fingerprint_tells_weights_apart(folder: Path) -> None:
    model = make(name_or_path=str(folder))
    first = fingerprint(model)
    assert difference(first, fingerprint(make(name_or_path=str(folder), seed=9))) == ""
    low = fingerprint(make(name_or_path=str(folder), dtype="bf16"))
    assert low["digest"] != first["digest"]
    assert difference(first, low) == difference(low, first) == ""
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert "values of model.norm.weight" in difference(first, fingerprint(model))
    with torch.no_grad():
        model.model.norm.weight[3] -= 1e-3
        model.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert "layers.1.mlp.up_proj" in difference(first, fingerprint(model))
    tied = fingerprint(make(TIED, seed=11))
    assert "it has no lm_head.weight" in difference(first, tied)
    assert "it has lm_head.weight besides" in difference(tied, first)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 4}, "type: is needed"),
        ({"type": "lorra"}, "did you mean 'lora'"),
        ({"type": "lora", "lora_alfa": 3}, "did you mean 'lora_alpha'"),
        ({"type": "ia3", "r": 3}, "no key of peft's IA3Config"),
        ({"type": "lora", "peft_type": "LORA"}, "same key"),
        ({"type": "lora", "task_type": "SEQ_CLS"}, "task_type"),
        ({"type": "lora", "inference_mode": True}, "does not belong here"),
        ({"type": "lora", "init_lora_weights": "eva"}, "pass over data"),
    ],
)
def test_a_wrong_key_is_found_by_validation(config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as raised:
        HFModelConfig.model_validate({"config": LLAMA, "peft_config": config})
    (error,) = raised.value.errors()
    said = f"{error['ctx']['place']}: {error['ctx']['message']} {error['ctx']['hint']}"
    assert sentence in said


@pytest.mark.parametrize(
    "config",
    [
        {"peft_config": LORA, "adapter": "/some/where"},
        {"quantization": "4bit"},
        {"adapter_dtype": "fp32"},
        {"peft_config": LORA, "weights_from": {"path": "/some/where"}},
        {"peft_config": LORA, "dtype": "fp32", "adapter_dtype": "bf16"},
        {"peft_config": LORA, "quantization": "4bit"},
        {"peft_config": CONFIGS["prefix"], "disable_activation_checkpoint": False},
    ],
)
def test_contradictions(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HFModelConfig.model_validate({"config": LLAMA, **config})


def test_keys_are_those_that_peft_has_and_are_known_without_it() -> None:
    from dataclasses import fields

    for kind, (_, name) in KINDS.items():
        # `init=False` fields are what peft keeps for itself
        assert {f.name for f in fields(getattr(peft, name)) if f.init} <= (keys_of(kind) or set())
    code = (
        "import sys\n"
        "from arctic_like.model.huggingface import HFModelConfig\n"
        "c = {'config': {'model_type': 'llama'}, 'peft_config': {'type': 'lora', 'r': 4}}\n"
        "HFModelConfig.model_validate(c)\n"
        "print(*sorted({'peft', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**LORA, "target_modules": ["qproj"]}, r"target_modules: names 'qproj', .*llama"),
        ({**LORA, "target_modules": ["q_proj", "wo"]}, r"names 'wo'"),
        ({**LORA, "target_modules": r".*\.dense"}, r"is the pattern '\.\*"),
        ({**LORA, "modules_to_save": ["embeddings"]}, r"modules_to_save: names 'embeddings'"),
        ({**LORA, "bias": "some"}, "peft cannot put it on this llama"),
        ({**LORA, "r": 0}, "peft"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(
    config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence) as raised:
        make(LLAMA, peft_config=config)
    (problem,) = raised.value.problems
    assert problem.place.startswith("model.peft_config")


def test_candidates_are_listed() -> None:
    with pytest.raises(RecipeError) as raised:
        make(LLAMA, peft_config={**LORA, "target_modules": ["query"]})
    for name in ("q_proj", "down_proj", "embed_tokens", "lm_head", "all-linear"):
        assert name in raised.value.problems[0].hint


def test_packed_documents_stay_apart_under_an_adapter() -> None:
    model = make(LLAMA, peft_config=LORA)
    check_isolation(model, vocab_size=262, device="cpu")
    ids, positions = IDS[:1], torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed = logits(model, **packed_inputs(model, ids, positions))
    alone = logits(model, input_ids=ids[:, 5:], use_cache=False)
    torch.testing.assert_close(packed[:, 5:], alone, rtol=0, atol=1e-6)
    leaky = make(MAMBA, peft_config={"type": "lora", "target_modules": ["in_proj"]})
    with pytest.raises(RecipeError, match="mamba"):
        check_isolation(leaky, vocab_size=262, device="cpu")


def test_virtual_tokens_and_packed_rows_exclude_each_other() -> None:
    for name in ("prompt", "prefix"):
        config = HFModelConfig.model_validate({"config": LLAMA, "peft_config": CONFIGS[name]})
        assert "virtual tokens" in (packing_refusal(config) or "")
    assert packing_refusal(HFModelConfig(config=LLAMA, peft_config=LORA)) is None


def test_generation_goes_through_the_adapter() -> None:
    model = make(LLAMA, peft_config=LORA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    model.config.use_cache = True
    ids = IDS[:1]
    said = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
    )
    for _ in range(5):
        ids = torch.cat([ids, logits(model, input_ids=ids, use_cache=False)[:, -1:].argmax(-1)], 1)
    assert said.tolist()[0] == ids.tolist()[0][: said.shape[1]]


def test_tokens_that_nobody_trains_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from loguru import logger

    shutil.copytree(folder, tmp_path / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokens")
    tokenizer.add_tokens(["<|think|>", "<|done|>"])
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING")
    try:
        with pytest.raises(RecipeError, match=r"modules_to_save: \[embed_tokens, lm_head\]"):
            make(name_or_path=str(folder), tokenizer=tokenizer, peft_config=LORA)
        room = pretrained(tmp_path / "room", {**LLAMA, "vocab_size": 272})
        tokenizer.name_or_path = str(tmp_path / "tokens")
        make(name_or_path=str(room), tokenizer=tokenizer, peft_config=LORA)
        assert "2 tokens" in lines[-1]
        assert "'<|done|>', '<|think|>'" in lines[-1]
        lines.clear()
        make(name_or_path=str(room), tokenizer=tokenizer, peft_config=CONFIGS["saved"])
        assert lines == []
    finally:
        logger.remove(sink)


def test_ends_that_an_adapter_parts_are_named() -> None:
    for config, parts in (
        (LORA, False),
        (CONFIGS["saved"], True),
        ({**LORA, "target_modules": ["embed_tokens"]}, True),
        ({**CONFIGS["saved"], "ensure_weight_tying": True}, False),
    ):
        model = make(TIED, peft_config=config)
        assert bool(parted(model)) is parts, config
        ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        if config.get("modules_to_save"):
            assert (ends[0] is ends[1]) is not parts
        assert parted(make(LLAMA, peft_config={**config, "ensure_weight_tying": False})) == ""


@pytest.mark.parametrize("shape", [LLAMA, TIED], ids=["llama", "tied"])
def test_embeddings_grow_for_added_tokens(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Old rows stay, new ones are the mean; the export comes back on the small base."""
    base = pretrained(tmp_path / "base", shape)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|think|>", "<|done|>"])
    config = {**CONFIGS["saved"], "ensure_weight_tying": shape is TIED}
    model = make(name_or_path=str(base), tokenizer=tokenizer, peft_config=config)
    old = make(name_or_path=str(base)).get_input_embeddings().weight
    new = model.get_input_embeddings().weight
    assert new.shape == (len(tokenizer), 32) == (264, 32)
    assert torch.equal(new[:262], old)
    torch.testing.assert_close(new[262:], old.mean(0).expand(2, 32))
    steps(model, lambda ids: model(ids, use_cache=False).logits)
    export(model, tokenizer, directory=tmp_path / "out", host=HostGroup(World()))
    loaded, its = load_for_inference(tmp_path / "out")
    assert len(its) == 264
    torch.testing.assert_close(logits(loaded), logits(model.eval()), rtol=0, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_quantisation_says_what_it_needs(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"quantization: .* no CUDA device"):
        make(name_or_path=str(folder), peft_config=LORA, quantization="4bit")
    with pytest.raises(RecipeError, match="LoftQ quantises with bitsandbytes"):
        make(LLAMA, peft_config={**LORA, "init_lora_weights": "loftq"})


def test_engine_and_adapter_mean_the_same_attribute() -> None:
    assert build.BASE == frozen_base.BASE
