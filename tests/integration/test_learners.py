"""Several learners, and growing parameters: the same on one rank and two, at every stage, after a kill."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_resume import counted, kill_when
from .tools import (
    CLOCKS,
    MODEL,
    arctic_train,
    drive,
    recipe,
    train_lines,
    without_clocks,
    write_conversations,
    write_recipe,
)

pytestmark = pytest.mark.full

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = (0, 2, 3)
EXAMPLES = {
    # a short last global batch, micro-batches that do not divide evenly
    "gan": ("digits/gan.yaml", {"train_iters": 6, "micro_batch_size": 24, "global_batch_size": 250,
                                "critic_steps": 2}),
    "splats": ("splats/fit.yaml", {"train_iters": 14, "densify_every": 4, "micro_batch_size": 3,
                                   "gradient_threshold": 1e-9, "prune_below": 0.499,
                                   "eval_interval": 7}),
}  # fmt: skip


def example(name: str) -> dict[str, Any]:
    """A shipped recipe, reduced, without pictures; its code file by its full path."""
    path, changes = EXAMPLES[name]
    content = yaml.safe_load((RECIPES / path).read_text())
    content["code"] = str((RECIPES / path).parent / content["code"])
    content |= changes
    content |= {"callbacks": [], "checkpoint": [], "train_log_iter_interval": 1, "device": "cpu",
                "logger": {"level": "WARNING"}}  # fmt: skip
    return content


def distillation(data: Path) -> dict[str, Any]:
    content = recipe(
        data, type="distill", temperature=2.0, distill_weight=0.7, global_batch_size=6,
        teacher={"model": {"config": {**MODEL, "hidden_size": 48, "num_hidden_layers": 3},
                           "dtype": "fp32"}, "frozen": True},
    )  # fmt: skip
    del content["gradient_accumulation_steps"]
    return content


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """<method>-<stage>-<ranks>: every method on two ranks at all stages, and on one rank at stage 0."""
    folder = tmp_path_factory.mktemp("learners")
    data = write_conversations(folder / "data.jsonl", count=24)
    contents = {"gan": example("gan"), "splats": example("splats"), "distill": distillation(data)}
    jobs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, content in contents.items():
        for stage, ranks in [(0, 1), *((stage, 2) for stage in STAGES)]:
            section = {**content.get("deepspeed", {}), "zero_optimization": {"stage": stage}}
            path = write_recipe(
                folder / f"{name}-{stage}-{ranks}.yaml", {**content, "deepspeed": section}
            )
            jobs[ranks].append({"recipe": str(path), "output_dir": str(path.with_suffix(""))})
    for ranks, listed in jobs.items():
        drive(listed, ranks=ranks, folder=folder)
    return folder


@pytest.mark.parametrize("name", ["gan", "splats", "distill"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_at_any_stage_are_one_rank(runs: Path, name: str, stage: int) -> None:
    one, two = train_lines(runs / f"{name}-0-1"), train_lines(runs / f"{name}-{stage}-2")
    assert len(one) == len(two) > 3
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            if key not in CLOCKS:
                assert theirs[key] == pytest.approx(mine[key], rel=2e-4, abs=2e-6), (
                    mine["step"],
                    key,
                )


def test_a_gan_is_the_bare_loop(tmp_path: Path) -> None:
    """Losses of both learners against plain torch: two modules, two AdamW, the same noise."""
    import copy

    import torch
    import torch.nn.functional as F

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.data.order import key_of
    from arctic_like.stop import StopRequest
    from arctic_like.trainer.noise import normal_noise

    content = {**example("gan"), "train_iters": 3, "critic_steps": 1}
    content["deepspeed"] = {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}
    kept: dict[str, Any] = {}

    def keep(trainer: Any) -> None:
        kept["models"] = {name: copy.deepcopy(m) for name, m in trainer.named_models.items()}
        kept["data"], kept["plan"] = trainer.equipment.data.train, trainer.equipment.plan

    path = write_recipe(tmp_path / "recipe.yaml", content)
    execute(
        load_recipe(path), output_dir=tmp_path / "run", resume="", stop=StopRequest(), inspect=keep
    )
    generator, critic = kept["models"]["model"], kept["models"]["critic"]
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=5e-4, betas=(0.5, 0.99), weight_decay=0, eps=1e-8)
        for m in (critic, generator)
    ]
    position, expected = 0, []
    for step in range(3):
        samples = [int(i) for i in kept["plan"].at(position).samples]
        position += len(samples)
        real = torch.stack([kept["data"][i][0] for i in samples])
        first, second = (normal_noise(samples, [64], key=key_of(42, step, k)) for k in (0, 1))
        made = generator(first).detach()
        judged = F.softplus(-critic(real)).mean() + F.softplus(critic(made)).mean()
        critic.zero_grad()
        judged.backward()
        optimizers[0].step()
        loss = F.softplus(-critic(generator(second))).mean()
        generator.zero_grad()
        loss.backward()
        optimizers[1].step()
        expected.append((judged.item(), loss.item()))
    found = [(line["critic/loss"], line["loss"]) for line in train_lines(tmp_path / "run")]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_splats_grow_and_are_pruned(runs: Path) -> None:
    shown = [line["eval/gaussians"] for line in without_clocks(runs / "splats-2-2")
             if "eval/gaussians" in line]  # fmt: skip
    assert len(set(shown)) > 2, shown


@pytest.mark.parametrize(
    ("name", "ranks", "stage"),
    [
        pytest.param("splats", 1, 0, marks=pytest.mark.full),
        pytest.param("gan", 2, 2, marks=pytest.mark.full),
        pytest.param("gan", 1, 3, marks=pytest.mark.full),
        pytest.param("splats", 2, 3, marks=pytest.mark.full),
    ],
)
def test_a_killed_run_is_the_run_that_was_never_killed(
    tmp_path: Path, name: str, ranks: int, stage: int
) -> None:
    """Killed with -9 after parameters were grown and pruned, or in the middle of a GAN's game."""
    content = example(name)
    content["checkpoint"] = [
        {"type": "deepspeed", "save_every_n_steps": 2, "keep_last": 2, "auto_resume": True}
    ]
    content["deepspeed"] = {"zero_optimization": {"stage": stage}}
    path = write_recipe(tmp_path / "recipe.yaml", content)
    launcher = ["--num_gpus", "2"] if ranks == 2 else []

    def words(output: str) -> list[str]:
        return [str(path), f"output_dir={tmp_path / output}", *launcher]

    done = arctic_train(*words("straight"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    killed = tmp_path / "killed"
    some = random.randint(5, len(without_clocks(tmp_path / "straight")) - 2)
    command = [sys.executable, "-m", "arctic_like.cli.main", *words("killed")]
    kill_when(command, lambda: counted(killed) >= some, run=killed, cwd=tmp_path)
    again = arctic_train(*words("killed"), cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-4000:]
    assert without_clocks(killed) == without_clocks(tmp_path / "straight")


def test_distillation_is_the_formula_in_float64(tmp_path: Path) -> None:
    """Against a bare computation on the same logits, labels with holes, temperature 2."""
    import torch

    from arctic_like.trainer.distill import DistillTrainer

    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 7, 11, dtype=torch.float32) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(0, 11, (2, 7))
    labels[0, 2:5] = labels[1, 0] = -100

    class Bare(DistillTrainer):
        name = "test_bare_distill"

        def __init__(self) -> None:
            self.config = type("C", (), {"temperature": 2.0, "distill_weight": 0.7})()

        def logits(self, batch: Any) -> Any:
            return student

        def teacher_logits(self, batch: Any) -> Any:
            return teacher

    found = Bare().loss({"labels": labels}).mean
    total, count = 0.0, 0
    for row in range(2):
        for place in range(6):
            target = int(labels[row, place + 1])
            if target == -100:
                continue
            count += 1
            own, theirs = student[row, place].detach().double(), teacher[row, place].double()
            p, q = (theirs / 2).softmax(-1), (own / 2).softmax(-1)
            kl = float((p * (p.log() - q.log())).sum())
            total += 0.3 * -float(own.log_softmax(-1)[target]) + 0.7 * 4 * kl
    assert float(found) == pytest.approx(total / count, rel=1e-6)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=4)
    content = distillation(data)
    content["teacher"]["model"]["config"]["vocab_size"] = 4096
    path = write_recipe(tmp_path / "recipe.yaml", content)
    done = arctic_train(str(path), cwd=tmp_path)
    assert done.returncode == 2
    assert "teacher.model" in done.stderr
    assert "4,096" in done.stderr
    assert "Traceback" not in done.stderr
