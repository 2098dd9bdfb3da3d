"""Batches pinned by a thread that runs ahead: the same batches, and nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from arctic_like.data.balance import Division
from arctic_like.data.loader import Loader, evaluation_batches
from arctic_like.data.order import BatchPlan
from tests.data.test_loader import COLLATE, Numbers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches(workers: int) -> None:
    division = Division(2, balance=True)

    def loader(*, pinned: bool) -> Loader:
        return Loader(
            Numbers(9),
            COLLATE,
            BatchPlan(9, 4, 1),
            division,
            num_workers=workers,
            pin_memory=pinned,
        )

    plain, steps = loader(pinned=False).steps(4), loader(pinned=True).steps(4)
    for _ in range(6):
        one, other = next(plain), next(steps)
        for here, there in zip(one.micro_batches, other.micro_batches, strict=True):
            assert here.samples == there.samples
            for name, tensor in there.data.items():
                assert tensor.is_pinned()
                assert torch.equal(tensor, here.data[name])
    steps.close()  # type: ignore[attr-defined]
    found = evaluation_batches(Numbers(5), COLLATE, division=division, pin_memory=True)
    assert sorted(s for micro in found for s in micro.samples) == list(range(5))
    assert not [thread for thread in threading.enumerate() if thread.name == "batches"]
