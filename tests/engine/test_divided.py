"""Parameters that AutoTP divides, as far as one process can tell; the rest is in tests/integration."""

from __future__ import annotations

from typing import Any

import pytest

from arctic_like.checkpoint.deepspeed import needs_conversion
from arctic_like.errors import RecipeError, RunError
from arctic_like.optimizer.limits import check_optimizer
from arctic_like.trainer.continuity import check_division
from arctic_like.world import World


def test_the_note_is_the_one_that_deepspeed_writes() -> None:
    from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

    from arctic_like.engine.divided import META

    assert META == DS_AUTOTP_UC_META


def test_what_is_not_divided_stays_as_it_is() -> None:
    import torch

    from arctic_like.engine.divided import (
        facts,
        is_divided,
        joined,
        part_of,
        total_norm,
        whole_shape,
    )

    module = torch.nn.Linear(3, 2)
    module(torch.ones(4, 3)).square().sum().backward()
    assert not is_divided(module)
    assert facts(module) == {}
    assert whole_shape(module.weight) == (2, 3)
    assert joined(module.weight, module.weight.detach()).data_ptr() == module.weight.data_ptr()
    assert part_of(module.weight, module.weight) is module.weight
    flat = torch.cat([p.grad.flatten() for p in module.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(total_norm(module.parameters()), flat.norm())


def test_unequal_parts_are_refused() -> None:
    import torch

    from arctic_like.engine.divided import META, division_of

    weight: Any = torch.nn.Parameter(torch.ones(2, 3))
    note = {"replicated": False, "partition_dim": 0, "logical_shape": (3, 3)}
    setattr(weight, META, {**note, "partition_sizes": (2, 1)})
    with pytest.raises(RunError, match="unequal parts"):
        division_of(weight)


def test_where_ranks_stand() -> None:
    """Those that share layers are neighbours; those that share tokens have them between."""
    worlds = [
        World(rank=rank, size=8, sequence_parallel_size=2, tensor_parallel_size=2)
        for rank in range(8)
    ]
    assert [w.data_rank for w in worlds] == [0] * 4 + [1] * 4
    assert [w.sequence_rank for w in worlds] == [0, 0, 1, 1] * 2
    assert [w.noise_rank for w in worlds] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [w.counts for w in worlds] == [True, False, False, False] * 2
    assert {w.data_size for w in worlds} == {2}


def test_what_is_converted_between_degrees() -> None:
    saved = {"world_size": 2, "tensor_parallel_size": 2, "zero_stage": 2}
    same, other = World(size=2, tensor_parallel_size=2), World(size=2)
    assert not needs_conversion(saved, world=same, zero_stage=2)
    assert needs_conversion(saved, world=other, zero_stage=2)
    before = {"world_size": 2, "zero_stage": 2}  # written before ranks could share layers
    assert needs_conversion(before, world=same, zero_stage=2)
    assert not needs_conversion(before, world=other, zero_stage=2)
    check_division(saved, tensor_parallel_size=1)
    whole = {**saved, "zero_stage": 0}
    check_division(whole, tensor_parallel_size=2)
    with pytest.raises(RecipeError, match=r"was 2 .* is 1 now(.|\n)*arctic-train export"):
        check_division(whole, tensor_parallel_size=1)


def test_an_optimizer_that_looks_at_whole_weights_is_refused() -> None:
    import torch

    class Lamb(torch.optim.SGD):
        """Its update looks at the norm of a parameter."""

    parameters = [torch.nn.Parameter(torch.ones(2))]
    check_optimizer(Lamb(parameters), zero_stage=0)
    check_optimizer(torch.optim.AdamW(parameters), zero_stage=0, divided=True)
    with pytest.raises(RecipeError, match="of which a rank has parts"):
        check_optimizer(Lamb(parameters), zero_stage=0, divided=True)
