"""What docs/coming_from.md promises to users of other trainers: each name works as the page says."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss

import arctic_like
from arctic_like import Trainer, load_recipe
from arctic_like.api import execute
from arctic_like.callbacks.base import Callback
from arctic_like.errors import RecipeError, RunError
from arctic_like.stop import StopRequest
from arctic_like.trainer.progress import Result
from arctic_like.trainer.supervised import SupervisedConfig
from arctic_like.world import World

from .surface_parts import Net, Points
from .tools import drive, lines, train_lines, write_recipe

HERE = "tests.integration.surface_parts"
PAGE = Path(__file__).parents[2] / "docs" / "coming_from.md"
_LEARNER = {
    "model": {"type": "torch", "class": f"{HERE}.Net"},
    "optimizer": {"type": "torch.optim.SGD", "lr": 0.1},
    "scheduler": {"name": "constant"},
}


def content(**changes: Any) -> dict[str, Any]:
    """Three learners over twelve points, two micro-batches a step, an evaluation every second step."""
    base: dict[str, Any] = {
        "type": "test_own_names", "device": "cpu", "seed": 3,
        **copy.deepcopy(_LEARNER), "critic": copy.deepcopy(_LEARNER),
        "teacher": {"model": _LEARNER["model"], "frozen": True},
        "data": {
            "type": "torch", "train": {"class": f"{HERE}.Points"},
            "evaluation": {"eval": {"class": f"{HERE}.Points", "kwargs": {"size": 5, "start": 50}}},
            "test": {"test": {"class": f"{HERE}.Points", "kwargs": {"size": 7, "start": 90}}},
        },
        "max_steps": 4, "val_interval": 2, "micro_batch_size": 2, "global_batch_size": 4,
        "callbacks": [{"type": "test_listening"}], "deepspeed": {"gradient_clipping": 0.0},
        "checkpoint": [{"type": "deepspeed", "save_every_n_steps": 2}],
        "logger": {"level": "WARNING"},
    }  # fmt: skip
    return base | changes


def train(
    folder: Path, *overrides: str, inspect: Callable[[Any], None] | None = None, resume: str = "",
    **changes: Any,
) -> Any:  # fmt: skip
    """Run it in this process; the trainer, still set up when `inspect` saw it."""
    held: list[Any] = []

    def keep(trainer: Any) -> None:
        held.append(trainer)
        if inspect:
            inspect(trainer)

    path = write_recipe(folder / "recipe.yaml", content(**changes))
    held.append(
        execute(
            load_recipe(path, overrides), output_dir=folder / "run", resume=resume,
            stop=StopRequest(), inspect=keep,
        )
    )  # fmt: skip
    return held[0]


def test_steps_take_a_batch_and_its_index(tmp_path: Path) -> None:
    """Losses of both trained models are those of plain SGD; evaluation's are means over the set."""
    models: dict[str, Any] = {}
    plan: list[Any] = []

    def look(trainer: Any) -> None:
        models.update({name: copy.deepcopy(m) for name, m in trainer.named_models.items()})
        plan.append(trainer.equipment.plan)

    trainer = train(tmp_path, inspect=look)
    assert trainer.was_built == ["critic", "model", "teacher"], "configure comes after the parts"
    assert trainer.local_batches == 8
    # two learners go through the same micro-batches, three steps an epoch
    assert trainer.indices["training"] == [
        i for step in (0, 1, 2, 0) for _ in range(2) for i in (2 * step, 2 * step + 1)
    ]
    assert trainer.indices["validation"] == [0, 1, 2] * 2
    assert trainer.visits.count == 16

    points, held_out = Points(), Points(size=5, start=50)
    found = lines(tmp_path / "run")
    position = 0
    for step in range(1, 5):
        chosen = [int(i) for i in plan[0].at(position).samples]
        position += len(chosen)
        line = next(one for one in found if one["step"] == step and "loss" in one)
        for name, key in (("critic", "critic/loss"), ("model", "loss")):
            loss = mse_loss(models[name](points.x[chosen]), points.y[chosen])
            assert line[key] == pytest.approx(loss.item(), rel=1e-5), (step, name)
            models[name].zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in models[name].parameters():
                    parameter -= 0.1 * parameter.grad
        if step % 2 == 0:
            made = models["model"](held_out.x)
            line = next(one for one in found if one["step"] == step and "eval/loss" in one)
            assert line["eval/loss"] == pytest.approx(mse_loss(made, held_out.y).item(), rel=1e-5)
            assert line["eval/largest"] == pytest.approx(made.abs().mean().item(), rel=1e-5)
            error = (made - held_out.y).abs().mean().item()
            assert line["eval/mae"] == pytest.approx(error, rel=1e-5)


def test_look_ups(tmp_path: Path) -> None:
    def look(trainer: Any) -> None:
        world = trainer.world
        assert (world.rank, world.size, world.device, world.is_main) == (0, 1, "cpu", True)
        assert (trainer.device, trainer.global_step, trainer.current_epoch) == ("cpu", 0, 0)
        assert trainer.max_steps == trainer.training_horizon == 4
        assert trainer.epochs == pytest.approx(4 / 3)
        for name in ("model", "critic", "teacher"):
            model = trainer.get_module(name)
            assert isinstance(model, Net)
            assert trainer.named_models[name] is model
            assert trainer.name_of(model) == name
        for name in ("model", "critic"):
            optimizer, scheduler = trainer.get_optimizer(name), trainer.get_scheduler(name)
            assert trainer.named_optimizers[name] is optimizer
            assert trainer.named_schedulers[name] is scheduler
            assert trainer.name_of(optimizer) == trainer.name_of(scheduler) == name
            owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert owned == {id(p) for p in trainer.get_module(name).parameters()}
        assert trainer.model.module is trainer.module is trainer.get_module()
        assert trainer.optimizer is trainer.get_optimizer()
        assert trainer.scheduler is trainer.get_scheduler()
        assert list(trainer.named_optimizers) == ["model", "critic"]
        assert trainer.get_module("critic.encoder.0") is trainer.named_models["critic"].encoder[0]
        assert not any(p.requires_grad for p in trainer.get_module("teacher").parameters())
        for ask, said in (
            (lambda: trainer.get_module("critik"), r"'critik'.*model, critic, teacher"),
            (lambda: trainer.get_module("critic.decoder"), "no module 'decoder'"),
            (lambda: trainer.get_optimizer("teacher"), "'teacher' is frozen"),
            (lambda: trainer.get_scheduler("teacher"), "'teacher' is frozen"),
            (lambda: trainer.name_of(Net()), "Net belongs to no learner"),
        ):
            with pytest.raises(RunError, match=said):
                ask()

    train(tmp_path, "deepspeed.zero_optimization.stage=0", inspect=look)


def test_loaders_give_what_the_loop_sees(tmp_path: Path) -> None:
    def look(trainer: Any) -> None:
        held_out = [micro.data[0] for micro in trainer.val_dataloader["eval"]]
        assert torch.equal(torch.cat(held_out), Points(size=5, start=50).x)
        assert trainer.train_dataloader is trainer.train_batches
        first = next(trainer.train_dataloader)
        assert [len(m.data[0]) for m in first.micro_batches] == [2, 2]
        expected = [int(i) for i in trainer.equipment.plan.at(0).samples]
        assert torch.equal(
            torch.cat([m.data[0] for m in first.micro_batches]), Points().x[expected]
        )

    train(tmp_path, inspect=look, max_steps=1, val_interval=0)


def test_moments_of_ones_own(tmp_path: Path) -> None:
    def look(trainer: Any) -> None:
        trainer.call_hook("after_densify", 7)
        trainer.emit("after_densify", 8)
        trainer.emit("nobody_has_this", 1, 2)

    told = train(tmp_path, inspect=look, max_steps=1).told
    assert told == [("trainer", 7), ("callback", 7), ("trainer", 8), ("callback", 8)]


def test_objects_of_ones_own_are_restored(tmp_path: Path) -> None:
    counts: list[int] = []
    train(tmp_path, "exit_iteration=3")
    train(tmp_path, inspect=lambda t: counts.append(t.visits.count), resume="latest")
    train(tmp_path, inspect=lambda t: counts.append(t.visits.count), resume="step-2")
    assert counts == [12, 8]


def test_the_whole_state_in_memory(tmp_path: Path) -> None:
    """Two steps, away and back, the same two again; optimizers, schedules, order and counters too."""
    courses: list[Any] = []

    def look(trainer: Any) -> None:
        def course() -> tuple[Any, ...]:
            for _ in range(2):
                trainer._next_step()
            weights = [
                p.detach().clone() for m in trainer.named_models.values() for p in m.parameters()
            ]
            return trainer.global_step, trainer.progress.position, trainer.visits.count, weights

        trainer._next_step()
        state = trainer.state_dict()
        courses.append(course())
        trainer.load_state_dict(state)
        courses.append(course())

    train(tmp_path, inspect=look, optimizer={"type": "adamw", "learning_rate": 0.05},
          scheduler={"name": "linear"}, max_steps=6, checkpoint=[])  # fmt: skip
    (*counts, weights), (*again, weights_again) = courses
    assert counts == again
    assert counts[0] == 3
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


def test_a_test_of_weights_from_a_path(tmp_path: Path) -> None:
    """An earlier checkpoint's weights, measured with `test_step`, against plain torch."""
    kept: dict[int, Any] = {}

    def look(trainer: Any) -> None:
        after = trainer._after_step

        def noting(batch: Any) -> None:
            kept[trainer.global_step + 1] = copy.deepcopy(trainer.module)
            after(batch)

        trainer._after_step = noting

    train(tmp_path, inspect=look)
    unseen = Points(size=7, start=90)
    found: list[Any] = []

    def measure(trainer: Any) -> None:
        found.append(trainer.test(str(tmp_path / "run/checkpoints/step-2")))
        found.append(trainer.test(tmp_path / "run/checkpoints/step-4"))
        found.append(trainer.indices["test"])

    train(tmp_path / "other", inspect=measure, test_only=True, checkpoint=[])
    for step, values in zip((2, 4), found, strict=False):
        expected = 2 * mse_loss(kept[step](unseen.x), unseen.y).item()
        assert values["test/loss"] == pytest.approx(expected, rel=1e-5)
    assert found[0] != found[1]
    assert found[2] == [0, 1, 2, 3] * 3, "twice here, once by the run itself"


def test_fit_returns_what_a_search_compares(tmp_path: Path) -> None:
    made: list[Any] = []
    train(tmp_path / "a", inspect=lambda t: made.append(t.fit()), metric_monitor="eval/mae")
    assert isinstance(made[0], Result)
    last = [line["eval/mae"] for line in lines(tmp_path / "a/run") if "eval/mae" in line][-1]
    assert made[0].final_loss == last
    path = write_recipe(tmp_path / "b.yaml", content(metric_monitor="eval/mae"))
    assert arctic_like.fit(load_recipe(path), output_dir=tmp_path / "b") == last
    path = write_recipe(
        tmp_path / "c.yaml", content(optimizer={"type": "torch.optim.SGD", "lr": 1e30}, max_steps=6)
    )
    assert arctic_like.fit(load_recipe(path), output_dir=tmp_path / "c") == math.inf


@pytest.mark.parametrize(
    ("key", "own", "value"),
    [
        ("val_interval", "eval_interval", "2 epoch"),
        ("eval_frequency", "eval_interval", 5),
        ("max_steps", "train_iters", 5),
        ("metric_monitor.metric_name", "metric_monitor.metric", "eval/mae"),
    ],
)
def test_a_key_has_two_spellings_but_not_at_once(
    tmp_path: Path, key: str, own: str, value: Any
) -> None:
    plain = {k: v for k, v in content().items() if k not in ("val_interval", "max_steps")}
    plain |= {"eval_interval": 1, "train_iters": 4}
    path = write_recipe(tmp_path / "recipe.yaml", plain)

    def read(*overrides: str) -> Any:
        found: Any = load_recipe(path, overrides).config
        for part in own.split("."):
            found = getattr(found, part)
        return found

    assert read(f"{key}={value}") == read(f"{own}={value}")
    both = plain | {"metric_monitor": {"metric_name": "eval/mae", "metric": "eval/mae"}}
    if "." not in key:
        both = plain | {key: value, own: value}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path / "both.yaml", both), [])
    assert key.rpartition(".")[2] in str(caught.value)
    assert own.rpartition(".")[2] in str(caught.value)


@pytest.mark.full
def test_two_ranks_have_one_mesh(tmp_path: Path) -> None:
    """`world.mesh` spans the ranks, and an all-reduce over it sums."""
    (tmp_path / "mesh.py").write_text(
        "import torch\n"
        "from torch.distributed import all_reduce\n"
        "from surface_parts import Listening, Net, OwnNames, Points\n"
        "class Meshed(OwnNames):\n"
        "    name = 'test_meshed'\n"
        "    def on_train_start(self):\n"
        "        mesh = self.world.mesh\n"
        "        assert mesh.mesh_dim_names == ('dp',) and mesh['dp'].size() == self.world.size == 2\n"
        "        assert mesh.get_local_rank('dp') == self.world.rank\n"
        "        total = torch.tensor(float(self.world.rank + 1))\n"
        "        all_reduce(total, group=mesh.get_group('dp'))\n"
        "        self.log({'over_the_mesh': total.item()})\n"
    )
    changes = {"type": "test_meshed", "code": str(tmp_path / "mesh.py"), "micro_batch_size": 1}
    path = write_recipe(tmp_path / "two.yaml", content(**changes))
    path.write_text(path.read_text().replace(f"{HERE}.", ""))  # the names in mesh.py
    drive([{"recipe": str(path), "output_dir": str(tmp_path / "two")}], ranks=2, folder=tmp_path)
    assert [one["over_the_mesh"] for one in lines(tmp_path / "two") if "over_the_mesh" in one] == [
        3.0
    ]
    train(tmp_path / "one")
    for one, two in zip(
        train_lines(tmp_path / "one/run"), train_lines(tmp_path / "two"), strict=True
    ):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["critic/loss"] == pytest.approx(one["critic/loss"], rel=1e-5)


def _rows() -> list[tuple[str, str]]:
    """(what it is here, remark) of the page's rows that say "same"."""
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in PAGE.read_text().splitlines()
             if row.startswith("| `")]  # fmt: skip
    return [(one[1], one[2]) for one in cells if len(one) == 3 and one[2].startswith("same")]


def test_every_name_that_the_page_calls_the_same_exists() -> None:
    """A key of the recipe or of a part's section, or an attribute of Trainer, Callback, World."""
    sections = {
        "metric_name", "mode", "warmup_steps", "warmup_ratio", "pad_to_multiple_of", "auto_resume",
        "priority", "world", "trainer", "arctic_like",
    }  # fmt: skip
    config = SupervisedConfig.model_construct(metric_monitor=None)
    known = {*SupervisedConfig.model_fields, *SupervisedConfig.aliases, *sections}
    for place in (Trainer, Trainer(config), Callback, World, arctic_like):
        known |= set(dir(place))
    known |= set(World.__dataclass_fields__)
    named = [
        part
        for here, _ in _rows()
        for name in re.findall(r"`([\w.]+)", here)
        for part in name.split(".")
    ]
    assert set(named) <= known, f"{PAGE.name}: {set(named) - known}"
    assert len(named) > 40
