"""`arctic-train merge`: one model that answers as base and adapter do, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from arctic_like.checkpoint import merge as merging
from arctic_like.checkpoint.huggingface import export
from arctic_like.cli.merge import command
from arctic_like.engine.host import HostGroup
from arctic_like.errors import RecipeError, RunError
from arctic_like.world import World
from tests.model.shapes import GPT2, LLAMA, TIED, byte_tokenizer, make

IDS = (torch.arange(48).view(4, 12) * 37 + 5) % 256
LORA = {"type": "lora", "r": 4, "target_modules": "all-linear"}
ENDS = ["q_proj", "embed_tokens", "lm_head"]
SHAPES = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name, shape in SHAPES.items():
        make(shape, seed=11).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in SHAPES}


def adapter(base: Path, folder: Path, config: dict[str, Any], **model: Any) -> Path:
    """An export of an adapter whose every weight has moved."""
    trained = make(name_or_path=str(base), seed=3, peft_config=config, **model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    export(trained, byte_tokenizer(), directory=folder, host=HostGroup(World()))
    return folder


def run(*words: Any) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS, use_cache=False).logits
        return result


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("shape", ["llama", "tied"])
@pytest.mark.parametrize(
    "config",
    [
        LORA,
        {**LORA, "use_rslora": True, "use_dora": True},
        {**LORA, "use_rslora": True, "target_modules": ENDS},
        {**LORA, "use_dora": True, "target_modules": ENDS},
        {**LORA, "init_lora_weights": "pissa"},
        {**LORA, "target_modules": ["lm_head"]},
        {**LORA, "modules_to_save": ["embed_tokens"]},
        {**LORA, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"type": "oft", "oft_block_size": 4, "target_modules": ["q_proj", "up_proj"]},
        {"type": "ia3"},
    ],
    ids=[
        "lora",
        "rsdora",
        "rslora-ends",
        "dora-ends",
        "pissa",
        "head",
        "saved",
        "saved-ends",
        "oft",
        "ia3",
    ],
)
def test_the_merged_model_answers_as_base_and_adapter(
    bases: dict[str, Path], tmp_path: Path, shape: str, config: dict[str, Any]
) -> None:
    """By transformers' own loading, against peft's own application of the exported adapter."""
    source = adapter(bases[shape], tmp_path / "adapter", config)
    done = run(source, tmp_path / "out")
    assert done.exit_code == 0, done.exception
    expected = logits(peft.PeftModel.from_pretrained(load(bases[shape]), source))
    found = logits(load(tmp_path / "out"))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - logits(load(bases[shape]))).abs().max() > 1e-3 * expected.abs().max()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_weights_are_those_of_merge_and_unload(bases: dict[str, Path], tmp_path: Path) -> None:
    for shape, targets in (("llama", "all-linear"), ("gpt2", ["c_attn", "c_fc"])):
        source = adapter(bases[shape], tmp_path / shape, {**LORA, "target_modules": targets})
        assert run(source, tmp_path / f"{shape}-out").exit_code == 0
        plain = peft.PeftModel.from_pretrained(load(bases[shape]), source).merge_and_unload()
        expected, found = plain.state_dict(), load(tmp_path / f"{shape}-out").state_dict()
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_base_keeps_its_dtype_and_another_can_be_asked_for(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    source = adapter(bases["llama"], tmp_path / "adapter", LORA, dtype="bf16")
    assert run(source, tmp_path / "own").exit_code == 0
    assert run(source, tmp_path / "wide", "--dtype", "fp32").exit_code == 0
    own, wide = load(tmp_path / "own", dtype="auto"), load(tmp_path / "wide", dtype="auto")
    assert (own.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].bfloat16()), name


def test_rows_of_added_tokens_are_in_the_merged_model(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|think|>"])
    config = {**LORA, "modules_to_save": ["embed_tokens", "lm_head"]}
    trained = make(name_or_path=str(bases["llama"]), tokenizer=tokenizer, peft_config=config)
    with torch.no_grad():
        trained.get_input_embeddings().weight[-1] = 0.5
    export(trained, tokenizer, directory=tmp_path / "adapter", host=HostGroup(World()))
    assert run(tmp_path / "adapter", tmp_path / "out").exit_code == 0
    merged = load(tmp_path / "out")
    assert merged.config.vocab_size == 263 == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert (merged.get_input_embeddings().weight[-1] == 0.5).all()
    torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=1e-6)


def test_a_wrong_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    source = adapter(bases["llama"], tmp_path / "adapter", LORA)
    make(LLAMA, seed=12).save_pretrained(tmp_path / "other")
    done = run(source, "--into", tmp_path / "other", tmp_path / "out")
    assert isinstance(done.exception, RecipeError)
    assert "another base" in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]
    moved = bases["llama"].rename(bases["llama"].with_name("moved"))
    try:
        assert run(source, "--into", moved, tmp_path / "out").exit_code == 0
    finally:
        moved.rename(bases["llama"])


def test_nothing_is_written_that_answers_otherwise(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that leaves tied ends together changes the head as well, which the comparison finds."""
    source = adapter(bases["tied"], tmp_path / "a", {**LORA, "target_modules": ["embed_tokens"]})
    monkeypatch.setattr(merging, "_untie", lambda model: None)
    done = run(source, tmp_path / "out")
    assert isinstance(done.exception, RunError)
    assert "logits differ" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_merged_says_so(bases: dict[str, Path], tmp_path: Path) -> None:
    prompt = {"type": "prompt_tuning", "num_virtual_tokens": 3}
    source = adapter(bases["llama"], tmp_path / "prompt", prompt)
    assert "virtual tokens" in str(run(source, tmp_path / "out").exception)
    assert "has no adapter" in str(run(bases["llama"], tmp_path / "out").exception)
    content = json.loads((source / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = None
    (source / "adapter_config.json").write_text(json.dumps(content))
    assert "--into BASE" in str(run(source, tmp_path / "out").exception)
    assert not (tmp_path / "out").exists()
