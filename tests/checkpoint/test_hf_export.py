"""The `huggingface` checkpoint: what others load is what was trained, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from arctic_like.checkpoint import huggingface as exporting
from arctic_like.checkpoint.base import CheckpointConfig, CheckpointEngine
from arctic_like.checkpoint.huggingface import HFCheckpoint, HFCheckpointConfig, export
from arctic_like.checkpoint.reading import read_weights
from arctic_like.checkpoint.safetensors import INDEX, SINGLE, write_weights
from arctic_like.cli.export import command
from arctic_like.engine.host import HostGroup
from arctic_like.engine.weights import iterate_weights, weight_bytes
from arctic_like.errors import CheckpointError, RecipeError
from arctic_like.inference import find, load_for_inference
from arctic_like.world import World
from tests.model.shapes import GPT2, LLAMA, MIXTRAL, TIED, byte_tokenizer, make

HOST = HostGroup(World())
IDS = torch.arange(24).view(2, 12)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


def save(model: Any, directory: Path, **config: Any) -> None:
    engine = HFCheckpoint(HFCheckpointConfig(**config))
    engine.save(
        module=model, tokenizer=byte_tokenizer(), directory=directory, world=World(), host=HOST
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", [LLAMA, TIED, GPT2, MIXTRAL], ids=["llama", "tied", "gpt2", "moe"]
)
def test_plain_transformers_gives_the_same_logits(
    tmp_path: Path, shape: dict[str, Any], dtype: str
) -> None:
    model = make(shape, dtype=dtype)
    save(model, tmp_path / "step-3")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-3")
    assert loaded.dtype == model.dtype
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.use_cache is True
    assert model.config.use_cache is False  # the live model trains on


def test_tokenizer_template_and_generation(tmp_path: Path) -> None:
    save(make(LLAMA), tmp_path / "step-3")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "step-3")
    own = byte_tokenizer()
    chat = [{"role": "user", "content": "hé?"}, {"role": "assistant", "content": "ho"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == own.apply_chat_template(
        chat, tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "step-3")
    assert model.generation_config.eos_token_id == own.eos_token_id
    assert model.generation_config.pad_token_id == own.pad_token_id


@pytest.mark.parametrize("shape", [TIED, MIXTRAL], ids=["tied", "moe"])
def test_names_are_those_that_transformers_publishes(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = make(shape)
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    with (
        safe_open(tmp_path / "ours" / SINGLE, "pt") as ours,
        safe_open(tmp_path / "theirs" / SINGLE, "pt") as theirs,
    ):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in ours.keys():  # noqa: SIM118 - no mapping
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))


@pytest.mark.parametrize("shape", [LLAMA, MIXTRAL], ids=["llama", "moe"])
def test_shards(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = make(shape)
    save(model, tmp_path / "export")
    (tmp_path / "export" / SINGLE).unlink()
    limit = 20_000
    assert write_weights(model, tmp_path / "export", shard_bytes=limit) is None
    files = sorted((tmp_path / "export").glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    assert not list((tmp_path / "export").glob("shard-*"))
    index = json.loads((tmp_path / "export" / INDEX).read_text())
    assert index["metadata"]["total_size"] == weight_bytes(model)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    for file in files:
        with safe_open(file, "pt") as shard:
            sizes = [shard.get_tensor(key).nbytes for key in shard.keys()]  # noqa: SIM118
        assert len(sizes) == 1 or sum(sizes) <= limit
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert torch.equal(logits(loaded), logits(model))


def test_iterate_weights() -> None:
    net = nn.Module()
    net.first, net.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    net.second.weight = net.first.weight
    net.register_buffer("kept", torch.ones(1))
    net.register_buffer("lost", torch.ones(1), persistent=False)
    found = dict(iterate_weights(net))
    assert list(found) == ["first.weight", "kept"]
    assert found["first.weight"] is not None
    assert found["first.weight"].data_ptr() != net.first.weight.data_ptr()
    assert next(iter(dict(iterate_weights(make(TIED))))) == "model.embed_tokens.weight"


class Killed(BaseException):
    """Stands for a kill: nothing handles it."""


@pytest.mark.parametrize("moment", ["weights", "description", "publish"])
def test_a_kill_leaves_nothing_visible_or_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = make(LLAMA, seed=1)
    save(old, tmp_path / "step-2")

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    place = {
        "weights": "arctic_like.checkpoint.safetensors._Shards.close",
        "description": "arctic_like.checkpoint.huggingface._write_description",
        "publish": "arctic_like.checkpoint.huggingface.files_below",
    }[moment]
    with monkeypatch.context() as patched:
        patched.setattr(place, die)
        for step in (2, 3):
            with pytest.raises(Killed):
                save(make(LLAMA, seed=2), tmp_path / f"step-{step}")
    assert not (tmp_path / "step-3").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-2")
    assert torch.equal(logits(loaded), logits(old))
    save(make(LLAMA, seed=2), tmp_path / "step-2")  # what was left behind is in nobody's way
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-2")
    assert torch.equal(logits(loaded), logits(make(LLAMA, seed=2)))
    assert {path.name for path in tmp_path.iterdir()} <= {"step-2", "step-3.partial"}


def test_a_failed_write_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("arctic_like.checkpoint.safetensors._Shards.add", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save(make(LLAMA), tmp_path / "step-1")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(exporting, "check_space", lambda *_: "there are 3 GB free")
    with pytest.raises(CheckpointError, match="3 GB free"):
        save(make(LLAMA), tmp_path / "step-1")


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not Linear"):
        save(nn.Linear(2, 2), tmp_path / "step-1")


def test_keep_last(tmp_path: Path) -> None:
    model = make(LLAMA)
    for step in (2, 9, 10):
        save(model, tmp_path / f"step-{step}", keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-9"]


def test_due() -> None:
    def due(*, step: int, epoch: int | None = None, **config: Any) -> bool:
        return CheckpointEngine(CheckpointConfig(**config)).due(step=step, epoch=epoch)

    assert [step for step in range(10) if due(step=step, save_every_n_steps=4)] == [4, 8]
    assert [e for e in range(7) if due(step=1, epoch=e, save_every_n_epochs=3)] == [3, 6]
    assert not due(step=4, save_every_n_epochs=1)
    assert not due(step=4, epoch=2)
    assert not due(step=4, save_every_n_steps=1, enabled=False)


def recipe(run: Path, shape: dict[str, Any], dtype: str) -> None:
    config = {
        "type": "sft",
        "model": {"config": shape, "dtype": dtype},
        "tokenizer": {"type": "byte"},
        "data": {"sources": [str(run / "none.jsonl")]},
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(json.dumps(config))


def checkpoint(run: Path, model: Any, step: int) -> Path:
    """A stage-0 checkpoint as DeepSpeed lays it out, complete."""
    folder = run / "checkpoints" / f"step-{step}"
    (folder / "engine").mkdir(parents=True)
    weights = {"module": model.state_dict(), "global_steps": step}
    torch.save(weights, folder / "engine" / "mp_rank_00_model_states.pt")
    (folder / "run.json").write_text("{}")
    (folder / "complete.json").write_text(json.dumps({"files": {}}))
    return folder


@pytest.mark.parametrize("shape", [TIED, MIXTRAL], ids=["tied", "moe"])
def test_load_for_inference(tmp_path: Path, shape: dict[str, Any]) -> None:
    """An export, a checkpoint, a run; the newest wins, the export where both are as new."""
    recipe(tmp_path, shape, "bf16")
    models = {step: make(shape, seed=step, dtype="bf16") for step in (2, 3)}
    save(models[2], tmp_path / "exports" / "step-2")
    folder = checkpoint(tmp_path, models[2], 2)
    assert find(tmp_path).folder == tmp_path / "exports" / "step-2"
    checkpoint(tmp_path, models[3], 3)
    incomplete = checkpoint(tmp_path, models[2], 4)
    (incomplete / "complete.json").unlink()
    for path, step, expected in (
        (tmp_path, None, 3),
        (tmp_path, 2, 2),
        (folder, None, 2),
        (tmp_path / "exports" / "step-2", None, 2),
    ):
        model, tokenizer = load_for_inference(path, step=step)
        assert model.dtype == torch.bfloat16
        assert not model.training
        assert model.config.use_cache is True
        assert torch.equal(logits(model), logits(models[expected]))
        assert len(tokenizer) == 262
    with pytest.raises(CheckpointError, match="not complete"):
        find(incomplete)
    with pytest.raises(RecipeError, match="steps: 2, 3"):
        find(tmp_path, step=7)


def test_what_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such folder"):
        find(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="neither"):
        find(tmp_path)
    recipe(tmp_path, LLAMA, "fp32")
    with pytest.raises(RecipeError, match="no complete export or checkpoint"):
        find(tmp_path)


def test_damage_is_told(tmp_path: Path) -> None:
    recipe(tmp_path, LLAMA, "fp32")
    folder = checkpoint(tmp_path, make({**LLAMA, "num_hidden_layers": 1}), 1)
    with pytest.raises(CheckpointError, match="does not belong to the model"):
        load_for_inference(tmp_path)
    (folder / "engine" / "mp_rank_00_model_states.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(folder)


def test_export_verb(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "out" / "model"
    recipe(run, LLAMA, "fp32")
    model = make(LLAMA, seed=5)
    checkpoint(run, model, 1)
    runner = CliRunner()
    assert runner.invoke(command, [str(run), str(target)], catch_exceptions=False).exit_code == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(target)), logits(model))
    assert {path.name for path in target.parent.iterdir()} == {"model"}
    for arguments, sentence in (
        ([str(run), str(target)], "not empty"),
        ([str(run), str(run / "recipe.yaml")], "is a file"),
        ([str(tmp_path / "no"), str(tmp_path / "new")], "no such folder"),
        ([str(run), str(tmp_path / "new"), "--dtype=int8"], "not a dtype"),
    ):
        failed = runner.invoke(command, arguments)
        assert isinstance(failed.exception, RecipeError)
        assert sentence in str(failed.exception)
        assert not (tmp_path / "new").exists()
    shutil.rmtree(target)
    runner.invoke(command, [str(run), str(target), "--dtype=bf16"], catch_exceptions=False)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_export_to_another_dtype_keeps_the_live_model(tmp_path: Path) -> None:
    model = make(LLAMA)
    export(model, byte_tokenizer(), directory=tmp_path / "x", host=HOST, dtype=torch.float16)
    assert model.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "x").dtype == torch.float16
