"""Layers, aliases, references, paths and overrides, on a user's own family and trainer."""

from pathlib import Path

import pytest

from arctic_like.errors import RecipeError
from arctic_like.recipe import load_recipe, run_time_refusals, warnings
from tests.recipe.workshop import RayConfig, RendererConfig, SceneTrainer


def problems_of(*args):
    with pytest.raises(RecipeError) as caught:
        load_recipe(*args)
    return caught.value.problems


def test_a_recipe_finds_its_trainer_and_parts(write):
    path = write(
        "a.yaml", "type: test_scene\nrenderers:\n  - {type: ray, w: 4Ki, rays: 3}\n  - mine\n"
    )
    recipe = load_recipe(path)
    assert recipe.trainer is SceneTrainer
    assert recipe.name == "a"
    assert recipe.path == path
    ray, flat = recipe.config.renderers
    assert (type(ray), ray.width, ray.rays) == (RayConfig, 4096, 3)
    assert (type(flat), flat.type, flat.scene) == (RendererConfig, "flat", "mine")
    assert recipe.config.given("renderers")
    assert not recipe.config.given("seed")


def test_one_map_where_a_list_is_expected(write):
    recipe = load_recipe(write("a.yaml", "type: test_scene\nrenderers: {type: flat, w: 3}\n"))
    assert [entry.width for entry in recipe.config.renderers] == [3]


# Layers ------------------------------------------------------------------------------------------


def test_extends_merges_maps_and_replaces_lists(write):
    write("base/one.yaml", "type: test_scene\nseed: 1\nepochs: 7\nnamed: {a: {w: 1, scene: x}, b: {w: 2}}\n"
                           "renderers: [{w: 1}, {w: 2}]\n")  # fmt: skip
    write("two.yaml", "extends: base/one.yaml\nseed: 2\nnamed: {a: {width: 5}}\n")
    path = write("a.yaml", "extends: [two.yaml]\nrenderers: [{w: 9}]\nnamed: {b: {type: flat}}\n")
    config = load_recipe(path).config
    assert (config.seed, config.epochs) == (2, 7)
    assert [entry.width for entry in config.renderers] == [9]
    # `w` below and `width` above are one key
    assert (config.named["a"].width, config.named["a"].scene) == (5, "x")
    assert config.named["b"].width == 2


def test_the_last_base_wins(write):
    write("one.yaml", "type: test_scene\nseed: 1\nepochs: 1\n")
    write("two.yaml", "seed: 2\n")
    config = load_recipe(write("a.yaml", "extends: [one.yaml, two.yaml]\n")).config
    assert (config.seed, config.epochs) == (2, 1)


def test_a_type_above_decides_about_aliases_below(write):
    write("base.yaml", "optimizer: {lr: 1e-3}\n")
    config = load_recipe(
        write("a.yaml", "extends: base.yaml\ntype: test_scene\noptimizer: {type: adamw}\n")
    ).config
    assert config.optimizer.learning_rate == 1e-3


def test_cycles_and_missing_bases(write):
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "seed: 1\nextends: a.yaml\n")
    (problem,) = problems_of("a.yaml")
    assert "extends itself: a.yaml → b.yaml → a.yaml" in problem.message
    assert (problem.file, problem.line) == ("b.yaml", 2)
    write("c.yaml", "extends: aa.yaml\n")
    (problem,) = problems_of("c.yaml")
    assert (problem.place, problem.line) == ("extends", 1)
    assert "aa.yaml" in problem.message
    assert "did you mean a.yaml?" in problem.hint


def test_both_spellings_of_a_key_in_one_map(write):
    (problem,) = problems_of(
        write("a.yaml", "type: test_scene\nnamed:\n  a:\n    w: 1\n    width: 2\n")
    )
    assert (problem.place, problem.line) == ("named.a.w", 4)
    assert "'width'" in problem.message


# References --------------------------------------------------------------------------------------


def test_references_keep_types(write, monkeypatch):
    monkeypatch.setenv("WIDE", "3Ki")
    monkeypatch.delenv("ABSENT", raising=False)
    path = write(
        "a.yaml",
        """
type: test_scene
seed: ${train_iters}
train_iters: 10^2
exposure: ${env:ABSENT:0.5}
named:
  a: {w: "${env:WIDE}", scene: "run-${seed}-${env:WIDE}-$${x}"}
  b: ${named.a}
renderers: ["${named.a.scene}"]
deepspeed: {zero_optimization: {stage: "${env:ABSENT:2}"}}
""",
    )
    recipe = load_recipe(path)
    config = recipe.config
    assert (config.seed, config.train_iters, config.exposure) == (100, 100, 0.5)
    assert config.named["a"].width == 3072
    assert config.named["a"].scene == "run-10^2-3Ki-${x}"
    assert config.named["b"] == config.named["a"]
    assert config.renderers[0].scene == config.named["a"].scene
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert "3Ki" not in recipe.dump()
    write("again.yaml", recipe.dump())
    assert load_recipe("again.yaml") == recipe


def test_references_that_lead_nowhere(write, monkeypatch):
    monkeypatch.delenv("ABSENT", raising=False)
    path = write("a.yaml", "type: test_scene\nseed: ${env:ABSENT}\nepochs: ${epoch}\ntrain_iters: ${a}\n"
                           "named: {a: {w: '${named.b.width}'}, b: {width: '${named.a.width}'}}\n"
                           "exposure: x${named}\n")  # fmt: skip
    found = {problem.place: problem for problem in problems_of(path)}
    assert "ABSENT, which is not set" in found["seed"].message
    assert "${env:ABSENT:default}" in found["seed"].hint
    assert found["seed"].line == 2
    assert "${epoch}" in found["epochs"].message
    assert "${epochs}" in found["epochs"].hint
    assert "refers to itself" in found["named.a.width"].message
    assert "a map or a list, into a text" in found["exposure"].message
    assert found.keys() == {
        "seed", "epochs", "train_iters", "named.a.width", "named.b.width", "exposure"
    }  # fmt: skip


# Paths -------------------------------------------------------------------------------------------


def test_a_path_belongs_to_the_file_that_states_it(write, tmp_path, monkeypatch):
    write("sub/rows.jsonl", "")
    write(
        "sub/base.yaml",
        """
type: test_scene
output_dir: out
renderers:
  - {scene: rows.jsonl, texture: t.png}
  - {scene: org/name}
  - {scene: ./absent.jsonl}
  - {scene: "rows.jsonl:train[:100]"}
  - {scene: "~/x"}
""",
    )
    path = write("top/a.yaml", "extends: ../sub/base.yaml\nlogger: {output_dir: logs}\n")
    config = load_recipe(path, ["kill_switch_path=stop"]).config
    sub = tmp_path / "sub"
    assert config.output_dir == sub / "out"
    assert config.renderers[0].texture == sub / "t.png"
    assert config.logger.output_dir == tmp_path / "top" / "logs"
    assert config.kill_switch_path == tmp_path / "stop"
    assert [entry.scene for entry in config.renderers] == [
        str(sub / "rows.jsonl"), "org/name", str(sub / "absent.jsonl"),
        str(sub / "rows.jsonl:train[:100]"), str(Path.home() / "x"),
    ]  # fmt: skip


def test_a_dump_is_the_same_recipe_anywhere(write, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "things")
    write("rows.jsonl", "")
    path = write(
        "a.yaml",
        """
type: test_scene
renderers: [{scene: rows.jsonl, texture: "${env:PLACE}/t.png", every: 5%, type: ray, rays: 1e3}]
optimizer: {lr: 1e-5}
checkpoint: {type: deepspeed}
""",
    )
    recipe = load_recipe(path, ["output_dir=out", "seed=7"])
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(recipe.dump())
    monkeypatch.chdir(folder)
    again = load_recipe(folder / "recipe.yaml")
    assert again == recipe
    assert again.config.model_fields_set == recipe.config.model_fields_set
    assert again.name == "elsewhere"
    assert "${env:PLACE}/t.png" in recipe.dump()
    assert "things" not in recipe.dump()
    assert again.dump() == recipe.dump()


# Overrides ---------------------------------------------------------------------------------------

BASE = "type: test_scene\nrenderers:\n  - {w: 1}\n  - {w: 2, scene: x}\nnamed: {a: {w: 3}}\n"


@pytest.mark.parametrize(
    ("override", "look", "value"),
    [
        ("seed=3", lambda c: c.seed, 3),
        ("optimizer.lr=1e-5", lambda c: c.optimizer.learning_rate, 1e-5),
        ("renderers.1.w=4Ki", lambda c: (c.renderers[1].width, c.renderers[1].scene), (4096, "x")),
        ("renderers=[]", lambda c: c.renderers, []),
        ("renderers=[{w: 7}]", lambda c: c.renderers[0].width, 7),
        ("renderers={w: 8}", lambda c: c.renderers[0].width, 8),
        ("named.a={scene: y}", lambda c: (c.named["a"].width, c.named["a"].scene), (3, "y")),
        ("named.b.w=5", lambda c: c.named["b"].width, 5),
        ("optimizer={type: fused_adam, lr: 2e-3}", lambda c: c.optimizer.learning_rate, 2e-3),
        ("logger.level=debug", lambda c: c.logger.level, "DEBUG"),
        ("eval_interval=1 epoch", lambda c: str(c.eval_interval), "1 epoch"),
        ("global_batch_size=", lambda c: c.global_batch_size, None),
        ("checkpoint=[]", lambda c: c.checkpoint, []),
        ("seed=${epochs}", lambda c: c.seed, 4),
        ("wandb.name=a=b", lambda c: c.wandb.name, "a=b"),
    ],
)  # fmt: skip
def test_overrides(write, override, look, value):
    path = write("a.yaml", BASE + "epochs: 4\n")
    assert look(load_recipe(path, [override]).config) == value


def test_an_override_may_change_the_trainer(write):
    assert load_recipe(write("a.yaml", "seed: 3\n"), ["type=test_scene"]).trainer is SceneTrainer


@pytest.mark.parametrize(
    ("override", "place", "message", "hint"),
    [
        ("sed=3", "sed", "not a key", "did you mean 'seed'?"),
        ("renderers.0.widht=3", "renderers.0.widht", "not a key of the test_renderer 'flat'", "'width'"),
        ("renderers.2.w=3", "renderers", "entries 0 to 1", "renderers.2.w=3"),
        ("renderers.w=3", "renderers", "is a list", "renderers.w=3"),
        ("checkpoint.0.type=deepspeed", "checkpoint", "no entries", ""),
        ("seed.x=3", "seed", "is 5, not a map", "seed.x=3"),
        ("seed=abc", "seed", "is 'abc', not a whole number", ""),
        ("seed", "", "is no override", "key=value"),
        ("a..b=1", "", "is no override", ""),
        ("seed=[1", "", "is not valid YAML", ""),
        ("extends=b.yaml", "extends", "belongs in a file", ""),
        ("seed=012", "", "octal", "write 12"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_be(write, override, place, message, hint):
    problem, *rest = problems_of(write("a.yaml", BASE + "seed: 5\n"), [override])
    assert not rest
    assert problem.place == place
    assert problem.file == "command line"
    assert problem.line is None
    assert message in problem.message
    assert hint in problem.hint


# A map instead of a file, what is declared in vain -------------------------------------------------


def test_a_recipe_from_a_map(write, tmp_path):
    write("rows.jsonl", "")
    recipe = load_recipe({"type": "test_scene", "renderers": ["rows.jsonl"]}, ["seed=3"])
    assert recipe.path is None
    assert recipe.config.renderers[0].scene == str(tmp_path / "rows.jsonl")
    assert load_recipe(recipe.resolved) == recipe
    (problem,) = problems_of({"type": "test_scene", "sede": 1})
    assert (problem.place, problem.file) == ("sede", "")


def test_refusals_and_warnings(write):
    path = write("a.yaml", "type: test_scene\nexpert_parallel_size: 2\ntiled_mlp_compute: false\n"
                           "skip_validation: true\narctic_moe: false\n"
                           "renderers: [{bounces: 3, quality: best}]\n")  # fmt: skip
    config = load_recipe(path).config
    assert [p.place for p in run_time_refusals(config)] == [
        "expert_parallel_size",
        "renderers.0.bounces",
    ]
    assert "is 2" in run_time_refusals(config)[0].message
    assert [p.place for p in warnings(config)] == ["skip_validation", "renderers.0.quality"]


def test_all_problems_at_once_in_the_order_of_the_file(write):
    path = write("a.yaml", "type: test_scene\nsede: 1\nepochs: 1.5\nepochs: 2\nnamed: {a: {w: x}}\n"
                           "logger: {level: loud, print_output_ranks: x}\n"
                           "deepspeed: {zero_optimisation: {}}\nwandb:\n")  # fmt: skip
    found = problems_of(path)
    assert [(p.line, p.place) for p in found] == [
        (2, "sede"), (3, "epochs"), (4, "epochs"), (5, "named.a.width"), (6, "logger.level"),
        (6, "logger.print_output_ranks"), (7, "deepspeed.zero_optimisation"), (8, "wandb"),
    ]  # fmt: skip
    assert "is 'loud', not" in found[4].message
    assert "'*' or a list" in found[5].message
    assert "zero_optimization" in found[6].hint
    assert found[7].message == "is empty, not a map"
