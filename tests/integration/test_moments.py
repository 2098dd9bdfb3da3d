"""The whole list of moments on one rank and two, and what a user's own file or package may add."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arctic_like.callbacks import base
from arctic_like.callbacks.base import MOMENTS

from .tools import arctic_train, drive, lines, recipe, write_conversations, write_recipe

RECORDER = '''
import contextlib

from arctic_like.callbacks.base import MOMENTS, Callback, CallbackConfig


class Recorder(Callback):
    """Writes every moment, and both ends of every bracket, to a file of its rank."""

    name = "test_recorder"
    config_type = CallbackConfig

    def note(self, trainer, text):
        folder = trainer.session.directory.path.parent
        with open(folder / f"moments-{trainer.world.size}-{trainer.world.rank}", "a") as file:
            file.write(text + "\\n")

    @contextlib.contextmanager
    def bracket(self, trainer, name):
        self.note(trainer, f"<{name}")
        yield
        self.note(trainer, f"{name}>")

    def around_step(self, trainer):
        return self.bracket(trainer, "step")

    def around_evaluate(self, trainer):
        return self.bracket(trainer, "evaluate")

    def around_export(self, trainer):
        return self.bracket(trainer, "export")


def noting(moment):
    def note(self, trainer, *values):
        text = values[0] if moment.startswith("on_part") else ""
        self.note(trainer, f"{moment} {text}".strip())
    return note


for moment in MOMENTS:
    setattr(Recorder, moment, noting(moment))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of five steps, accumulation 2, an evaluation every 3 steps, a checkpoint every 4."""
    folder = tmp_path_factory.mktemp("moments")
    train = write_conversations(folder / "train.jsonl", count=20)
    held_out = write_conversations(folder / "eval.jsonl", count=2, seed=1)
    (folder / "recorder.py").write_text(RECORDER)
    content = recipe(
        train, epochs=2, train_iters=0, global_batch_size=4, eval_interval=3, eval_at_start=True,
        data__pack_samples=False, data__eval_sources=[str(held_out)], test_at_end=True,
        data__test_sources=[str(held_out)], code=str(folder / "recorder.py"),
        callbacks=[{"type": "test_recorder"}],
        checkpoint=[{"type": "deepspeed", "save_every_n_steps": 4, "save_end_of_training": True}],
    )  # fmt: skip
    del content["gradient_accumulation_steps"]
    for ranks in (1, 2):
        path = write_recipe(folder / f"{ranks}.yaml", {**content, "micro_batch_size": 2 // ranks})
        job = {"recipe": str(path), "output_dir": str(folder / f"run-{ranks}")}
        drive([job], ranks=ranks, folder=folder)
    return folder


def documented() -> list[str]:
    """What the list in `callbacks/base.py` says of that run, brackets with it."""
    batch = ["on_evaluate_batch_start", "on_evaluate_batch_end"]
    evaluation = ["<evaluate", "on_evaluate_start", *batch, "on_evaluate_end", "evaluate>"]
    checkpoint = ["on_checkpoint_start", "on_checkpoint_end"]
    step = [
        "<step", "on_step_start", *(["on_micro_batch_start", "on_micro_batch_end"] * 2),
        "on_gradients_ready", "on_optimizer_step_start", "on_optimizer_step_end", "step>",
        "on_step_end", "on_log",
    ]  # fmt: skip
    whole = ["on_run_start", "on_setup_start"]
    for part in ("tokenizer", "data", "model", "optimizer", "engine", "scheduler"):
        whole += [f"on_part_start {part}", f"on_part_end {part}"]
    whole += ["on_setup_end", "on_train_start", *evaluation]
    for number in range(1, 11):
        whole += ["on_epoch_start"] if number in (1, 6) else []
        whole += step
        whole += ["on_epoch_end"] if number in (5, 10) else []
        whole += evaluation if number in (3, 6, 9) else []
        whole += checkpoint if number in (4, 8) else []
    whole += [*checkpoint, "<export", "export>", "on_train_end"]
    whole += ["<evaluate", "on_test_start", *batch, "on_test_end", "evaluate>", "on_run_end"]
    return whole


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_the_moments_are_those_of_the_documented_list(folder: Path, ranks: int, rank: int) -> None:
    assert (folder / f"moments-{ranks}-{rank}").read_text().splitlines() == documented()


def test_every_moment_stands_in_the_list_and_is_an_empty_method() -> None:
    from arctic_like.trainer.base import Trainer

    for moment in (*MOMENTS, "around_step", "around_evaluate", "around_export", "on_non_finite"):
        assert moment in (base.__doc__ or ""), moment
        assert callable(getattr(base.Callback, moment)), moment
        assert callable(getattr(Trainer, moment)), moment
    named = {name for name in vars(base.Callback) if name.startswith(("on_", "around_"))}
    assert named - {"around_step", "around_evaluate", "around_export", "on_non_finite"} == set(
        MOMENTS
    )


OWN = '''
"""A family, a member of it, a callback with a moment of its own, and a trainer that uses them."""

from typing import Annotated

from pydantic import Field

from arctic_like import Loss, SFTTrainer
from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import PartConfig
from arctic_like.registry import Part, build
from arctic_like.registry.choice import Choice
from arctic_like.trainer.sft import SFTConfig


class WeightingConfig(PartConfig):
    """`weighting:` of the recipe."""

    type: str = "flat"


class Weighting(Part, family="NAME_weighting"):
    """Scales the loss of a step."""

    config_type = WeightingConfig

    def factor(self, step):
        return 1.0


class Flat(Weighting):
    name = "flat"


class RampConfig(WeightingConfig):
    """From one up by `slope` a step."""

    type: str = "ramp"
    slope: float = 0.5


class Ramp(Weighting):
    name = "ramp"
    config_type = RampConfig

    def factor(self, step):
        return 1 + self.config.slope * step


class OwnConfig(SFTConfig):
    type: str = "NAME_sft"
    weighting: Annotated[PartConfig, Choice("NAME_weighting")] = Field(default_factory=dict)


class OwnSFT(SFTTrainer):
    name = "NAME_sft"
    config_type = OwnConfig

    def configure(self):
        self.weighting = build(self.config.weighting, "NAME_weighting")

    def loss(self, batch):
        factor = self.weighting.factor(self.global_step)
        if self.module.training:
            self.emit("on_weighted", factor)
        return Loss(super().loss(batch) * factor)


class Watching(Callback):
    name = "NAME_watching"
    config_type = CallbackConfig

    def on_weighted(self, trainer, factor):
        self.last = factor

    def on_log(self, trainer, values):
        values["factor"] = self.last
'''


def _train(folder: Path, name: str, code: str, **environment: str) -> list[dict[str, Any]]:
    data = write_conversations(folder / "data.jsonl", count=12)
    content = recipe(
        data, type=f"{name}_sft", train_iters=3, callbacks=[{"type": f"{name}_watching"}],
        weighting={"type": "ramp", "slope": 0.25},
    )  # fmt: skip
    if code:
        content["code"] = code
    path = write_recipe(folder / f"{name}.yaml", content)
    done = arctic_train(str(path), f"output_dir={folder / name}", cwd=folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    plain = {k: v for k, v in content.items() if k not in ("callbacks", "weighting", "code")}
    path = write_recipe(folder / "plain.yaml", {**plain, "type": "sft"})
    done = arctic_train(str(path), "output_dir=plain", "overwrite=true", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    weighted, unweighted = lines(folder / name)[0], lines(folder / "plain")[0]
    assert weighted["loss"] == unweighted["loss"], "the first step's factor is one"
    return [line for line in lines(folder / name) if "factor" in line]


def test_a_file_of_ones_own_adds_moment_family_and_trainer(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("NAME", "filed"))
    found = _train(tmp_path, "filed", "own.py")
    assert [line["factor"] for line in found] == [1.0, 1.25, 1.5]
    wrong = (tmp_path / "filed.yaml").read_text().replace("type: ramp", "type: rampe")
    (tmp_path / "wrong.yaml").write_text(wrong)
    done = arctic_train("validate", "wrong.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "weighting" in done.stderr
    assert "ramp" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_an_installed_package_adds_them_through_its_entry_point(tmp_path: Path) -> None:
    """Built and installed by pip into a folder of its own; the recipe names no file."""
    package = tmp_path / "package"
    (package / "packaged_parts").mkdir(parents=True)
    (package / "packaged_parts/__init__.py").write_text(OWN.replace("NAME", "packaged"))
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "packaged-parts"\nversion = "1.0"\n'
        '[project.entry-points."arctic_like.plugins"]\npackaged = "packaged_parts"\n'
    )
    installed = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-index", "--no-deps", "--no-build-isolation", "--target", installed, package],
        check=True,
    )  # fmt: skip
    found = _train(tmp_path, "packaged", "", PYTHONPATH=str(installed))
    assert [line["factor"] for line in found] == [1.0, 1.25, 1.5]
    result = json.loads((tmp_path / "packaged/result.json").read_text())
    assert result["steps"] == 3
