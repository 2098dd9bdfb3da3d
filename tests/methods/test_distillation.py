"""Distillation: TRL's divergences, a teacher in memory, divided or kept on disk, hidden states."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_like import load_recipe, run
from arctic_like.errors import RecipeError
from arctic_like.methods.distillation import coarse, divergence, highest
from arctic_like.trainer.teacher_table import row_key
from tests.integration.tools import MODEL, train_lines, write_conversations, write_recipe
from tests.methods.runs import Jobs, initial_model, samples_of, series, whole

TEACHER = {"config": {**MODEL, "num_hidden_layers": 3, "initializer_range": 0.3}, "dtype": "fp32"}
HIDDEN = {"hidden_layers": {1: 2, 2: 3}, "hidden_weight": 0.5, "divergence": "jsd", "beta": 0.3}


def logits(*, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(6, 9, generator=draw, dtype=torch.float64)


def by_hand(student: torch.Tensor, teacher: torch.Tensor, kind: str, beta: float) -> list[float]:
    """Term by term, from probabilities."""
    found = []
    for q, p in zip(student.softmax(-1).tolist(), teacher.softmax(-1).tolist(), strict=True):
        kl = {
            "forward": sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)),
            "reverse": sum(y * math.log(y / x) for x, y in zip(p, q, strict=True)),
        }
        m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
        of_p = sum(x * math.log(x / z) for x, z in zip(p, m, strict=True))
        of_q = sum(y * math.log(y / z) for y, z in zip(q, m, strict=True))
        found.append({**kl, "jsd": beta * of_p + (1 - beta) * of_q}[kind])
    return found


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergences_are_their_formulas(kind: Any) -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    found = divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind=kind, beta=0.3)
    assert found.tolist() == pytest.approx(by_hand(student, teacher, kind, 0.3), rel=1e-9)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)])
def test_divergences_are_trls_with_their_gradients(kind: Any, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    gradients = []
    for ours in (True, False):
        student, teacher = logits(seed=0).requires_grad_(), logits(seed=1)
        if ours:
            own, theirs = ((one / 2).log_softmax(-1) for one in (student, teacher))
            loss = divergence(own, theirs, kind=kind, beta=beta).sum()
        else:
            loss = gkd.GKDTrainer.generalized_jsd_loss(
                student[None], teacher[None], beta=beta, temperature=2.0, reduction="sum"
            )
        gradients.append((float(loss.detach()), torch.autograd.grad(loss, student)[0]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-5, atol=1e-8)


def test_what_is_kept_is_the_highest_and_the_rest_as_one() -> None:
    teacher = logits(seed=1)
    tokens, kept = highest(teacher, count=3, temperature=2.0)
    shares = (teacher / 2).softmax(-1)
    for row in range(6):
        ordered = sorted(shares[row].tolist(), reverse=True)
        expected = [*ordered[:3], sum(ordered[3:])]
        assert kept[row].exp().tolist() == pytest.approx(expected, rel=1e-6)
        assert [float(shares[row, one]) for one in tokens[row]] == ordered[:3]
    student = logits(seed=0)
    own = coarse(student, tokens, temperature=2.0)
    assert own.exp().sum(-1).tolist() == pytest.approx([1.0] * 6)
    part = divergence(own, kept.double(), kind="forward")
    full = by_hand(student / 2, teacher / 2, "forward", 0.5)
    assert all(0 < a < b for a, b in zip(part.tolist(), full, strict=True))


def test_all_tokens_kept_are_the_whole_divergence() -> None:
    student, teacher = logits(seed=0), logits(seed=1)
    tokens, kept = highest(teacher, count=50, temperature=1.0)
    assert kept.shape == tokens.shape == (6, 9)
    own = coarse(student, tokens, temperature=1.0)
    found = divergence(own, kept.double(), kind="forward")
    assert found.tolist() == pytest.approx(by_hand(student, teacher, "forward", 0.5), rel=1e-5)


def test_a_row_has_its_key_with_and_without_padding() -> None:
    row = ([1, 2, 3], [-100, 2, 3], [0, 1, 2])
    padded = ([1, 2, 3, 9, 9], [-100, 2, 3, -100, -100], [0, 1, 2, 0, 1])
    assert row_key(*row) == row_key(*padded)
    assert row_key(*row) != row_key([1, 2, 3], [-100, -100, 3], [0, 1, 2])
    assert row_key(*row) != row_key([1, 2, 4], [-100, 2, 3], [0, 1, 2])


# Runs -----------------------------------------------------------------------------------------------


def distill(data: Path, **changes: Any) -> dict[str, Any]:
    own = {
        "type": "distill", "data__type": "sft", "temperature": 2.0, "distill_weight": 0.7,
        "teacher": {"model": TEACHER, "frozen": True}, "train_iters": 3,
        "eval_interval": 1,
    }  # fmt: skip
    return whole(data, **{**own, **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of one rank for all runs."""
    folder = tmp_path_factory.mktemp("distillation")
    data = write_conversations(folder / "data.jsonl", count=11)
    write_conversations(folder / "eval-data.jsonl", count=5, seed=1)
    jobs, small = Jobs(folder), {"micro_batch_size": 2}
    jobs.add("hidden-whole", distill(data, **HIDDEN))
    jobs.add("hidden-fine", distill(data, **HIDDEN, **small))
    jobs.add("plain", distill(data))
    jobs.add("kept", distill(data, teacher_cache={"top_k": 1000}))
    jobs.add("few-whole", distill(data, teacher_cache={"top_k": 8}))
    jobs.add("few-fine", distill(data, teacher_cache={"top_k": 8}, **small))
    jobs.drive()
    return folder


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What only the full tests look at."""
    folder = tmp_path_factory.mktemp("more-distillation")
    data = write_conversations(folder / "data.jsonl", count=11)
    write_conversations(folder / "eval-data.jsonl", count=5, seed=1)
    divided: dict[str, Any] = {"model": TEACHER, "frozen": True}
    divided["deepspeed"] = {"zero_optimization": {"stage": 3}}
    jobs, small = Jobs(folder), {"micro_batch_size": 2}
    jobs.add("hidden-whole", distill(data, **HIDDEN))
    jobs.add("hidden-two", distill(data, **HIDDEN, **small, teacher=divided), ranks=2)
    jobs.add("few-whole", distill(data, teacher_cache={"top_k": 8}))
    jobs.add("few-two", distill(data, teacher_cache={"top_k": 8}, **small,
                                deepspeed__zero_optimization__stage=2), ranks=2)  # fmt: skip
    jobs.drive()
    return folder


@pytest.mark.parametrize("name", ["hidden", "few"])
def test_a_step_is_the_same_in_small_micro_batches(runs: Path, name: str) -> None:
    same(runs, name, "fine")


@pytest.mark.full
@pytest.mark.parametrize("name", ["hidden", "few"])
def test_a_step_is_the_same_on_two_ranks(more_runs: Path, name: str) -> None:
    same(more_runs, name, "two")


def same(runs: Path, name: str, division: str) -> None:
    one, other = runs / f"{name}-whole", runs / f"{name}-{division}"
    assert len(train_lines(one)) == 3
    apart = {"hidden": ["jsd", "hidden"], "few": ["kl"]}[name]
    for key in ("loss", "grad_norm", "cross_entropy", "eval/loss", *apart):
        assert len(series(one, key)) > 1, key
        assert series(other, key) == pytest.approx(series(one, key), rel=2e-5), key


def test_a_teacher_that_was_kept_whole_is_the_teacher_in_memory(runs: Path) -> None:
    for key in ("loss", "grad_norm", "kl", "eval/loss", "eval/kl"):
        found = series(runs / "kept", key)
        assert found
        assert found == pytest.approx(series(runs / "plain", key), rel=1e-4), key


def test_few_tokens_are_a_part_of_the_divergence(runs: Path) -> None:
    part, full = series(runs / "few-whole", "kl")[0], series(runs / "plain", "kl")[0]
    assert 0 < part < 0.9 * full


def test_the_teacher_is_asked_once(runs: Path) -> None:
    """Two kept runs of eight tokens, in other micro-batches, and one of all: two tables."""
    entries = [path for path in (runs / "cache" / "teacher").iterdir() if path.is_dir()]
    widths = sorted(len(torch.from_numpy(_tokens(path))[0]) for path in entries)
    assert widths == [8, 8, 262, 262]  # of training and of evaluation


def _tokens(folder: Path) -> Any:
    import numpy as np

    return np.load(folder / "tokens.npy")


def test_the_first_loss_is_the_formula_with_hidden_states(runs: Path) -> None:
    made = distill(runs / "data.jsonl", **HIDDEN)
    student = initial_model(made, runs).eval()
    teacher = initial_model({**made, "model": TEACHER}, runs).eval()
    samples, total, count = samples_of(made, runs), 0.0, 0
    for number in range(len(samples)):
        sample = samples[number]
        ids = torch.from_numpy(sample["input_ids"])[None]
        with torch.no_grad():
            own, theirs = (m(ids, output_hidden_states=True) for m in (student, teacher))
        for place in range(ids.shape[1] - 1):
            target = int(sample["labels"][place + 1])
            if target == -100:
                continue
            count += 1
            q, p = (one.logits[0, place].double() for one in (own, theirs))
            (apart,) = by_hand(q[None] / 2, p[None] / 2, "jsd", 0.3)
            total += 0.3 * -float(q.log_softmax(-1)[target]) + 0.7 * 4 * apart
            for mine, other in ((1, 2), (2, 3)):
                a, b = own.hidden_states[mine][0, place], theirs.hidden_states[other][0, place]
                total += 0.5 * float((a - b).double().square().mean()) / 2
    assert series(runs / "hidden-whole", "loss")[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_layers": {1: 4}}, "layer 4; the teacher has 3"),
        (
            {"hidden_layers": {1: 1}, "teacher__model__config__hidden_size": 48},
            "32 values with states of 48",
        ),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=3)
    write_conversations(tmp_path / "eval-data.jsonl", count=3)
    made = distill(data, **changes, output_dir=str(tmp_path / "run"))
    with pytest.raises(RecipeError, match=said):
        run(load_recipe(write_recipe(tmp_path / "recipe.yaml", made)))


def test_hidden_states_of_a_kept_teacher_are_refused(tmp_path: Path) -> None:
    data = write_conversations(tmp_path / "data.jsonl", count=3)
    made = distill(data, hidden_layers={1: 1}, teacher_cache={})
    with pytest.raises(RecipeError, match="hidden states are not kept"):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", made))


# The recipe -----------------------------------------------------------------------------------------

TINY = Path(__file__).parents[2] / "recipes" / "distill"


def test_the_tiny_recipes_data_is_what_its_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TINY / "make_tiny.py"), str(tmp_path)], check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in TINY.glob("*.jsonl")}
    both = [set(written[name].splitlines()) for name in ("tiny.jsonl", "tiny_heldout.jsonl")]
    assert not both[0] & both[1]


@pytest.mark.full
def test_the_tiny_student_closes_most_of_its_gap_to_the_teacher(tmp_path: Path) -> None:
    place = f"output_dir={tmp_path / 'teacher'}"
    taught = run(load_recipe(TINY / "teacher.yaml", [place]))
    (export,) = taught.exports
    changes = [f"teacher.model.name_or_path={export}", f"output_dir={tmp_path / 'student'}"]
    run(load_recipe(TINY / "tiny.yaml", changes))
    apart = series(tmp_path / "student", "eval/kl")
    assert apart[-1] < 0.05 * apart[0]
    losses = series(tmp_path / "student", "eval/cross_entropy")
    gap = [loss - taught.metrics["eval/loss"] for loss in (losses[0], losses[-1])]
    assert gap[1] < 0.1 * gap[0]
