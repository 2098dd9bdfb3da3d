"""The JSON Schema against recipes that load and recipes that do not; and what `init` prints."""

import re

import jsonschema
import pytest
import yaml

from arctic_like import registry
from arctic_like.errors import RecipeError
from arctic_like.recipe import load_recipe
from arctic_like.recipe.schema import recipe_schema
from arctic_like.recipe.starter import starting_recipe
from tests.recipe.workshop import SceneTrainer


@pytest.fixture(scope="module")
def validator():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


GOOD = [
    {"renderers": [{"w": "4Ki"}, "x", {"type": "ray", "rays": 3}]},
    {"renderers": {"type": "flat"}, "named": {"a": {"scene": "x"}}},
    {"seed": "10^3", "optimizer": {"lr": "1e-4"}, "eval_interval": "5%"},
    {"eval_interval": "1 epoch", "loss_log_interval": 10, "train_iters": "1.25M"},
    {"checkpoint": {"type": "deepspeed"}, "device": "cpu", "logger": {"print_output_ranks": "*"}},
    {"global_batch_size": None, "wandb": {"name": None}},
]
BAD = [
    {"sede": 1},
    {"seed": True},
    {"eval_interval": "often"},
    {"renderers": [{"type": "ry"}]},
    {"renderers": [{"type": "flat", "rays": 3}]},
    {"renderers": [{"widht": 3}]},
    {"optimizer": {"lr": "fast"}},
    {"device": "tpu"},
    {"logger": {"levl": "INFO"}},
    {"checkpoint": [{"type": "nope"}]},
]


@pytest.mark.parametrize("recipe", GOOD)
def test_what_loads_is_valid(validator, recipe):
    recipe = {"type": "test_scene", **recipe}
    load_recipe(recipe)
    assert [error.message for error in validator.iter_errors(recipe)] == []


@pytest.mark.parametrize("recipe", BAD)
def test_what_does_not_load_is_not(validator, recipe):
    recipe = {"type": "test_scene", **recipe}
    with pytest.raises(RecipeError):
        load_recipe(recipe)
    assert not validator.is_valid(recipe)


def test_files_may_extend_refer_and_say_half(validator):
    recipe = {"type": "test_scene", "extends": "base.yaml", "seed": "${env:SEED}"}
    recipe |= {"renderers": [{"type": "ray"}], "wandb": {"enable": "${env:W:false}"}}
    assert validator.is_valid(recipe)


def test_other_trainers_keys_are_unknown(validator):
    assert validator.is_valid({"type": "dpo", "beta": 0.1})
    assert not validator.is_valid({"type": "sft", "beta": 0.1})
    assert not validator.is_valid({"beta": 0.1})
    assert not validator.is_valid({"type": "stf"})


@pytest.mark.parametrize("name", ["sft", "causal", "test_scene"])
def test_a_starting_recipe_is_valid(validator, write, name):
    text = starting_recipe(registry.lookup("trainer", name))
    config = load_recipe(write("a.yaml", text)).config
    assert config.type == name
    assert validator.is_valid(yaml.safe_load(text))
    assert max(map(len, text.splitlines())) <= 100
    # every key is there, stated or behind a #
    keys = set(re.findall(r"^#?(\w+):", text, re.MULTILINE))
    hidden = {*type(config).not_yet, *type(config).no_effect}
    assert keys == type(config).model_fields.keys() - hidden


def test_its_commented_defaults_are_the_defaults(write):
    text = starting_recipe(SceneTrainer)
    plain = load_recipe(write("a.yaml", text)).config
    # a map whose keys are all commented needs its own # to stay: drop only those of simple keys
    stated = re.sub(r"^( *)#(?=\w+: )", r"\1", text, flags=re.MULTILINE)
    stated = re.sub(r"^#(wandb|logger|metric_monitor):$", r"\1:", stated, flags=re.MULTILINE)
    assert load_recipe(write("b.yaml", stated)).config == plain
