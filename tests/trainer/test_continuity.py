"""What a resume refuses: an order of samples that belongs to another global batch size."""

from __future__ import annotations

import numpy as np
import pytest

from arctic_like.data.order import BatchPlan, GroupedPlan
from arctic_like.errors import RecipeError
from arctic_like.trainer.continuity import changes, check_batch_size, refused


def test_batches_of_like_length_keep_their_size() -> None:
    saved = {"global_batch_size": 8}
    plain = BatchPlan(100, 4, 0)
    check_batch_size(saved, plain)  # any order of single samples goes on
    check_batch_size(saved, GroupedPlan(BatchPlan(100, 8, 0), np.arange(100), 0))
    with pytest.raises(RecipeError, match=r"global_batch_size: was 8 .* is 4 now"):
        check_batch_size(saved, GroupedPlan(plain, np.arange(100), 0))


def test_a_resume_may_divide_global_batches_otherwise() -> None:
    after = {"data": {"balance": False, "max_tokens_per_batch": 4096, "source_metrics": False}}
    assert not refused(changes({"data": {}}, after))
    assert refused(changes({"data": {}}, {"data": {"group_by_length": True}}))


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"kwargs": {"width": 8}}},
        {"optimizer": {"type": "adamw"}},
        {"frozen": True},
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
    ],
)
def test_a_further_learner_is_what_it_was(change: dict[str, object]) -> None:
    """As of the recipe's own model; its learning rate and attention may change."""
    assert refused(changes({"critic": {}}, {"critic": change}))
    harmless = {"optimizer": {"lr": 1}, "model": {"attn_implementation": "eager"}}
    assert not refused(changes({"critic": {}}, {"critic": harmless}))
