"""`code:`: a user's file with a family, a part and a trainer of its own."""

import sys

import pytest

from arctic_like import registry
from arctic_like.errors import RecipeError
from arctic_like.recipe import load_recipe

CODE = """
from typing import Annotated
from arctic_like.config.base import PartConfig
from arctic_like.config.values import HumanFloat
from arctic_like.registry import Part
from arctic_like.registry.choice import Choice
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.config import TrainerConfig

class Reward(Part, family="{tag}_reward"):
    pass

class LengthConfig(PartConfig):
    aliases = {{"w": "weight"}}
    weight: HumanFloat = 1.0

class Length(Reward):
    name = "length"
    config_type = LengthConfig

class Config(TrainerConfig):
    reward: Annotated[PartConfig, Choice("{tag}_reward")] = PartConfig()

class Rewarded(Trainer):
    name = "{tag}_rewarded"
    config_type = Config
    {tag}_reward_factory_type = Length
    data_factory_type = model_factory_type = ()

    def loss(self, batch):
        return batch
"""


def test_a_family_of_ones_own(write):
    write("mine.py", CODE.format(tag="own"))
    path = write("a.yaml", "code: mine.py\ntype: own_rewarded\nreward: {w: 5%}\n")
    recipe = load_recipe(path)
    assert recipe.config.reward.weight == 0.05
    assert recipe.config.reward.type == "length"
    assert registry.build(recipe.config.reward, "own_reward").config.weight == 0.05
    # the same file again is the same module, and a dump names it absolutely
    write("far/recipe.yaml", recipe.dump())
    assert load_recipe("far/recipe.yaml") == recipe
    assert not list(path.parent.glob("**/__pycache__"))


def test_train_py_beside_the_recipe_is_found(write, tmp_path):
    write("sub/train.py", CODE.format(tag="beside"))
    path = write("sub/a.yaml", "type: beside_rewarded\n")
    recipe = load_recipe(path)
    assert recipe.config.code == tmp_path / "sub" / "train.py"
    # the recipe that a run saves stands elsewhere
    write("run/recipe.yaml", recipe.dump())
    assert load_recipe("run/recipe.yaml") == recipe


def test_code_on_the_command_line_belongs_to_the_current_folder(write):
    write("here.py", CODE.format(tag="cmd"))
    path = write("sub/a.yaml", "seed: 1\n")
    assert load_recipe(path, ["code=here.py", "type=cmd_rewarded"]).trainer.name == "cmd_rewarded"


def test_a_changed_file_is_imported_again(write):
    path = write("a.yaml", "code: mine.py\ntype: again_rewarded\n")
    write("mine.py", CODE.format(tag="again"))
    first = load_recipe(path).trainer
    assert load_recipe(path).trainer is first
    write("mine.py", CODE.format(tag="again") + "    extra = 3\n")
    assert load_recipe(path).trainer.extra == 3


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        ("from arctic_like.trainer.base import Trainer\nclass T(Trainer):\n    name = 'bad'\n"
         "boom()\n", 4, "NameError: name 'boom' is not defined"),
        ("x = (\n", 1, "SyntaxError"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
        ("def f():\n    raise ValueError('no')\n\nf()\n", 4, "line 2, in f: raise ValueError('no')"),
        ("from arctic_like.trainer.base import Trainer\nclass T(Trainer):\n    name = 'bad'\n"
         "    model_factory_type = 'hugingface'\n", 2, "did you mean 'huggingface'"),
    ],
)  # fmt: skip
def test_errors_in_it_name_file_and_line(write, code, line, message):
    mine = write("mine.py", code)
    path = write("a.yaml", "code: mine.py\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == (str(mine), line)
    assert "bad" not in registry.names("trainer")
    assert message in problem.message
    assert not [name for name in sys.modules if name.startswith("arctic_code_mine_") and
                getattr(sys.modules[name], "__file__", "") == str(mine)]  # fmt: skip


def test_a_missing_file(write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write("a.yaml", "seed: 1\ncode: mine.py\n"))
    (problem,) = caught.value.problems
    assert (problem.place, problem.line) == ("code", 2)
    assert "mine.py" in problem.message


def test_a_trainer_whose_config_is_no_trainers_config(write):
    code = ["from arctic_like.config.base import PartConfig",
            "from arctic_like.trainer.base import Trainer",
            "class T(Trainer):", "    name = 'odd_config'", "    config_type = PartConfig"]  # fmt: skip
    write("mine.py", "\n".join(code))
    with pytest.raises(RecipeError, match="not derived from TrainerConfig"):
        load_recipe(write("a.yaml", "code: mine.py\ntype: odd_config\n"))
