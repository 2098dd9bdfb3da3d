"""Recipes of full-size models are planned without weights, and take what their headers say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from arctic_like.model.attention import VARLEN
from arctic_like.model.attention_choice import choose, facts_of
from tests.integration.tools import arctic_train
from tests.methods.runs import write_rows
from tests.recipes.test_full_size import FULL_SIZE, billions, name_of, room_of

LLAMA = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
         "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "max_position_embeddings": 131072}  # fmt: skip
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA,
    "Mistral-7B": {**LLAMA, "model_type": "mistral", "vocab_size": 32768, "sliding_window": None},
    "Qwen3-8B": {**QWEN, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
    "Qwen3-4B": {**QWEN, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "Qwen3-0.6B": {**QWEN, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "gemma-3-1b": {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152,
                   "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
                   "num_key_value_heads": 1, "head_dim": 256},
    "SmolLM2-1.7B": {**LLAMA, "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192,
                     "num_hidden_layers": 24, "num_key_value_heads": 32,
                     "max_position_embeddings": 8192, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_a_rank_holds_its_part_of_layers_that_are_shared(tmp_path: Path, degree: int) -> None:
    """Four layers of Llama 8B on eight GPUs: of their projections a rank has 1/degree, and all the rest."""
    shape = {**LLAMA, "num_hidden_layers": 4}
    recipe = tmp_path / "shared.yaml"
    (tmp_path / "none.jsonl").touch()
    content = {
        "type": "sft", "model": {"config": shape, "dtype": "bf16"}, "tokenizer": {"type": "byte"},
        "micro_batch_size": 1, "global_batch_size": 8,
        "data": {"sources": ["none.jsonl"], "max_length": 2048},
        "deepspeed": {"tensor_parallel": {"autotp_size": degree}, "zero_optimization": {"stage": 2}},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(content))
    done = arctic_train("plan", str(recipe), "--no-data", "--gpus", "8", "--json", cwd=tmp_path)
    assert done.stdout.startswith("{"), done.stderr[-4000:]
    plan = json.loads(done.stdout)
    divided = 4 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    whole = 2 * 128256 * 4096 + 9 * 4096
    assert plan["parameters"] == divided + whole
    own = divided / degree + whole
    assert math.isclose(plan["between_steps"]["weights"], 2 * own, rel_tol=0.001)
    assert math.isclose(plan["between_steps"]["optimizer"], 12 * own * degree / 8, rel_tol=0.001)


def folder_of(name: str, root: Path) -> str:
    """A folder with the config of a model of the Hub, and nothing else."""
    key = next(key for key in SHAPES if key in name)
    folder = root / key
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[key]))
    return str(folder)


def without_the_hub(path: Path, root: Path) -> Path:
    """The recipe with models of which there is the shape alone. Texts, whose lengths only data say, are made
    up: all are cut to `data.max_length`."""
    content = yaml.safe_load(path.read_text())
    for part in (content, *(content[other] for other in ("teacher", "base") if other in content)):
        if not part["model"]["name_or_path"].startswith("$"):  # as another's
            part["model"]["name_or_path"] = folder_of(part["model"]["name_or_path"], root)
    if "code" in content:
        content["code"] = str(path.parent / content["code"])
    data = content["data"]
    if data.get("type") == "embedding":
        rows = [
            {
                "question": f"{number}" * data["max_length"],
                "answer": f"a{number}" * data["max_length"],
            }
            for number in range(3 * content["global_batch_size"])
        ]
        data["sources"][0]["name_or_path"] = str(write_rows(root / "texts.jsonl", rows))
        data |= {"train_eval_split": [0.9, 0.1], "cache_dir": str(root / "cache")}
        content["tokenizer"] = {"type": "byte"}
    recipe = root / path.name
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.mark.parametrize("name", SHAPES)
def test_auto_takes_variable_lengths_without_a_package(name: str) -> None:
    """On an A100 or H100: no full-size recipe needs to name its attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(**{**SHAPES[name], "num_hidden_layers": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    facts = facts_of(model, device="cpu", dtype="bfloat16")
    for capability in ((8, 0), (9, 0)):
        there = replace(facts, device="cuda", capability=capability, packages=frozenset())
        assert choose(there).implementation == VARLEN


@pytest.mark.full
@pytest.mark.parametrize("path", FULL_SIZE, ids=name_of)
def test_it_is_planned_without_weights(tmp_path: Path, path: Path) -> None:
    """The peak is the header's, to 3 %. Between steps a rank holds 18 bytes a trained parameter over the
    ranks: weights in bf16, gradients, masters and two moments in fp32."""
    recipe, room = without_the_hub(path, tmp_path), room_of(path)
    content = yaml.safe_load(recipe.read_text())
    texts = content["data"].get("type") == "embedding"
    done = arctic_train(
        "plan", str(recipe), *([] if texts else ["--no-data"]), "--gpus", str(room.gpus),
        "--gpu-memory", f"{room.memory}GiB", "--json", cwd=tmp_path, timeout=900,
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stderr[-4000:]
    plan = json.loads(done.stdout)
    assert plan["fits"], plan
    assert plan["peak"] / 2**30 == pytest.approx(room.peak, rel=0.03)
    whole = plan["trained_parameters"] == plan["parameters"]
    if whole and "base" not in content:  # a speculator's heads are not the model that it names
        size = billions(yaml.safe_load(path.read_text())["model"]["name_or_path"])
        assert math.isclose(plan["parameters"], size * 1e9, rel_tol=0.01)
        if "teacher" not in content:
            kept = sum(
                plan["between_steps"].get(k, 0) for k in ("weights", "gradients", "optimizer")
            )
            assert math.isclose(kept, 18 * plan["parameters"] / room.gpus, rel_tol=0.25)
