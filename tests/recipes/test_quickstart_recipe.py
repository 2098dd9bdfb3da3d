"""The quickstart recipe says what its header and the documentation promise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from arctic_like import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture(scope="module")
def config():
    return load_recipe(RECIPE).config


def test_its_header_is_its_command():
    assert "#     arctic-train recipes/quickstart.yaml\n" in RECIPE.read_text()


def test_it_needs_no_download(config):
    assert config.tokenizer.type == "byte"
    assert config.model.config["model_type"] == "llama"
    assert not config.model.name_or_path


def test_it_measures_before_and_after(config):
    assert config.eval_at_start
    assert config.eval_at_end
    (callback,) = config.callbacks
    assert callback.type == "exact_match"


def test_its_paths_belong_to_the_recipe(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RECIPE.parent, tmp_path / "elsewhere")
    moved = load_recipe(Path("elsewhere/quickstart.yaml")).config
    for recipe, folder in ((config, RECIPE.parent), (moved, tmp_path / "elsewhere")):
        held_out = folder / "data" / "quickstart_heldout.jsonl"
        assert Path(recipe.callbacks[0].source.name_or_path) == held_out
        assert Path(recipe.data.eval_sources["eval"][0].name_or_path) == held_out
        assert Path(recipe.data.sources[0].name_or_path).parent == held_out.parent


def test_it_ends_with_something_to_resume_and_something_to_use(config):
    assert {entry.type for entry in config.checkpoint} == {"deepspeed", "huggingface"}
    assert all(entry.save_end_of_training for entry in config.checkpoint)
