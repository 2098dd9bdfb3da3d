"""A recipe dumped and loaded again is the same recipe: for drawn values, and for those that are shipped."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arctic_like.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))

NUMBERS = st.one_of(
    st.integers(1, 10**9),
    st.sampled_from(["4Ki", "10^6", "1.25M", "1e3", "1_000", "${env:N}", "${epochs}"]),
)
TEXTS = st.one_of(
    st.text(max_size=12).filter(lambda text: "${" not in text),
    st.sampled_from(
        ["no", "1e-5", "012", "${env:NAME}/x", "$${x}", "a: b", "${env:GONE:d}", " x", "./x"]
    ),
)
RENDERERS = st.one_of(
    TEXTS,
    st.fixed_dictionaries({}, optional={"w": NUMBERS, "scene": TEXTS, "every": st.sampled_from(
        ["5%", "1 epoch", "0.25 epochs", 7, "10 min", 0])}),
    st.fixed_dictionaries({"type": st.just("ray"), "rays": NUMBERS}),
)  # fmt: skip
SCENES = st.fixed_dictionaries(
    {"type": st.just("test_scene")},
    optional={
        "seed": NUMBERS,
        "train_iters": NUMBERS,
        "renderers": st.one_of(st.lists(RENDERERS, max_size=3), RENDERERS),
        "named": st.dictionaries(st.sampled_from(["a", "b", "no", "1"]), RENDERERS, max_size=2),
        "exposure": st.one_of(st.floats(allow_nan=False), st.just("5%"), st.just("1e-5")),
        "wandb": st.fixed_dictionaries({}, optional={"name": TEXTS, "enable": st.booleans()}),
        "output_dir": st.sampled_from(["out", "../out", "~/out", "/abs", "${env:NAME}/out"]),
        "deepspeed": st.just({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8}}),
    },
)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(scene=SCENES)
def test_drawn_recipes(write, monkeypatch, scene):
    monkeypatch.setenv("N", "17")
    monkeypatch.setenv("NAME", "secret")
    monkeypatch.delenv("GONE", raising=False)
    recipe = load_recipe({"epochs": 3, **scene})
    dumped = recipe.dump()
    assert "secret" not in dumped
    # from another folder: paths are absolute, in the map too
    again = load_recipe(write("run/recipe.yaml", dumped))
    assert again == recipe
    assert again.config.model_fields_set == recipe.config.model_fields_set
    assert again.dump() == dumped
    # from Python: the canonical map, without a file
    assert load_recipe(recipe.resolved) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_some_recipes_are_shipped():
    assert RECIPES
