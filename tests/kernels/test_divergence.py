"""Tiled distillation against the definition of each divergence, and against TRL's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arctic_like.kernels.linear_loss import linear_distillation, linear_kl
from arctic_like.kernels.tiles import Head
from tests.kernels.plain import Case, distance, logits, token_losses
from tests.kernels.test_linear_loss import assert_near

KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)]


def pair(**options: Any) -> tuple[Case, Case]:
    """(student, teacher): the teacher is wider, and its head caps where the student's scales."""
    student = Case.drawn(bias=True, scale=1.5, **options).to(torch.float64)
    teacher = Case.drawn(width=12, softcap=4.0, seed=1, **options).to(torch.float64)
    return student, teacher


def head(case: Case) -> Head:
    return Head(case.weight, **case.options)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tile", [3, 1000])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_every_divergence_is_its_definition(
    kind: Any, beta: float, tile: int, frozen: bool
) -> None:
    student, teacher = pair()
    student.weight.requires_grad_(not frozen)
    student.bias.requires_grad_(not frozen)  # type: ignore[union-attr]
    found = linear_kl(
        student.hidden, head(student), teacher.hidden, head(teacher), kind=kind, beta=beta,
        temperature=2.5, tile=tile, trained=student.targets != -100,
    )  # fmt: skip
    plain = student.to(torch.float64)
    expected = distance(logits(plain), logits(teacher).detach(), kind, 2.5, beta)
    expected = expected * (student.targets != -100)
    assert_near(found.detach(), expected.detach(), 1e-8)
    weights = torch.linspace(-2, 3, len(found), dtype=found.dtype)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_near(student.hidden.grad, plain.hidden.grad, 1e-8)
    if not frozen:
        assert_near(student.weight.grad, plain.weight.grad, 1e-8)
        assert_near(student.bias.grad, plain.bias.grad, 1e-8)  # type: ignore[union-attr]
    assert teacher.weight.grad is None
    assert teacher.hidden.grad is None


@pytest.mark.parametrize("tile", [3, 1000])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_distillation_is_both_losses(kind: Any, beta: float, tile: int) -> None:
    student, teacher = pair()
    found = linear_distillation(
        student.hidden, head(student), teacher.hidden, head(teacher), student.targets, share=0.3,
        kind=kind, beta=beta, temperature=2.0, tile=tile,
    )  # fmt: skip
    plain = student.to(torch.float64)
    labels = token_losses(plain).sum()
    apart = distance(logits(plain), logits(teacher).detach(), kind, 2.0, beta)
    apart = apart[student.targets != -100].sum()
    assert_near(found.cross_entropy, labels.detach(), 1e-8)
    assert_near(found.divergence, apart.detach(), 1e-8)
    (found.total / 7).backward()
    ((0.7 * labels + 0.3 * 4 * apart) / 7).backward()
    for key, gradient in plain.gradients().items():
        assert_near(student.gradients()[key], gradient, 1e-8)


@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)])
def test_divergences_are_trls(kind: Any, beta: float) -> None:
    trl = pytest.importorskip("trl.experimental.gkd")
    student, teacher = pair(trained="all")
    found = linear_kl(
        student.hidden, head(student), teacher.hidden, head(teacher), kind=kind,
        beta=beta if kind == "jsd" else 0.5, temperature=1.5,
    )  # fmt: skip
    expected = trl.GKDTrainer.generalized_jsd_loss(
        logits(student)[None], logits(teacher)[None], beta=beta, temperature=1.5, reduction="sum"
    )
    assert float(found.detach().sum()) == pytest.approx(float(expected.detach()), rel=1e-8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sideways"}, "no divergence"),
        ({"temperature": 0.0}, "not positive"),
        ({"kind": "jsd", "beta": 1.0}, "between 0 and 1"),
        ({"teacher": Head(torch.zeros(36, 12))}, "37 logits, the teacher 36"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], message: str) -> None:
    given = {
        "hidden": torch.zeros(3, 8), "head": Head(torch.zeros(37, 8)),
        "teacher_hidden": torch.zeros(3, 12), "teacher": Head(torch.zeros(37, 12)), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        linear_kl(**given)
