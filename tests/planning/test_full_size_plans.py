"""Recipes of full-size models are planned without weights, and hold what their headers say."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.tools import arctic_train
from tests.recipes.test_full_size import FULL_SIZE, billions, header, name_of

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
    content = {
        "type": "sft", "model": {"config": shape}, "tokenizer": {"type": "byte"}, "micro_batch_size": 1,
        "global_batch_size": 8, "data": {"sources": ["none.jsonl"], "max_length": 2048},
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


@pytest.mark.full
@pytest.mark.parametrize("path", FULL_SIZE, ids=name_of)
def test_it_is_planned_without_weights(tmp_path: Path, path: Path) -> None:
    """Between steps a rank holds 18 bytes a trained parameter over the ranks: weights in bf16, gradients,
    masters and two moments in fp32, as the header says; and it all fits on the GPUs that are named there."""
    content = yaml.safe_load(path.read_text())
    said = header(path)
    name = content["model"]["name_or_path"]
    content["model"]["name_or_path"] = folder_of(name, tmp_path)
    if "teacher" in content:
        teacher = content["teacher"]["model"]
        teacher["name_or_path"] = folder_of(teacher["name_or_path"], tmp_path)
    recipe = tmp_path / path.name
    recipe.write_text(yaml.safe_dump(content))
    found_gpus = re.search(r"--num_gpus (\d+)", said)
    memory = re.search(r"GPUs? of (\d+) GB", said)
    assert memory
    gpus = int(found_gpus[1]) if found_gpus else 1
    done = arctic_train(
        "plan", str(recipe), "--no-data", "--gpus", str(gpus), "--gpu-memory", f"{memory[1]}GiB",
        "--json", cwd=tmp_path, timeout=600,
    )  # fmt: skip
    if content["data"].get("type") == "embedding":  # how long its texts are the data alone say
        assert "leave out --no-data" in done.stderr
        return
    assert done.stdout.startswith("{"), done.stderr[-4000:]
    plan = json.loads(done.stdout)
    assert plan["fits"], plan
    if plan["trained_parameters"] == plan["parameters"]:
        assert math.isclose(plan["parameters"], billions(name) * 1e9, rel_tol=0.01)
        if "teacher" not in content:
            kept = sum(
                plan["between_steps"].get(k, 0) for k in ("weights", "gradients", "optimizer")
            )
            assert math.isclose(kept, 18 * plan["parameters"] / gpus, rel_tol=0.25)
