"""Snapshots of states: equal to what they were taken from, and apart from it."""

from __future__ import annotations

import io
import resource
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.engine.snapshot import HostArena
from arctic_like.engine.states import standalone, tensors_in

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64)


@st.composite
def states(draw: st.DrawFn) -> Any:
    """Nested states whose tensors may be views, transposed, shared, empty, scalars or parameters."""
    shared = [
        torch.randn(3, 4),
        torch.nn.Parameter(torch.randn(5), requires_grad=draw(st.booleans())),
    ]
    flat = torch.randn(20)

    def tensor() -> st.SearchStrategy[Any]:
        shapes = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 3, 2)])

        def make(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Any:
            value = (torch.rand(shape) * 5).to(dtype)
            if kind == "view" and value.numel() > 2:
                return torch.cat([value.flatten(), value.flatten()])[1 : value.numel()]
            if kind == "part" and value.numel():
                begin = draw(st.integers(0, 20 - value.numel()))
                return flat[begin : begin + value.numel()].view(shape)
            if kind == "transposed" and value.ndim >= 2:
                return value.transpose(0, 1)
            return shared[hash(shape) % 2] if kind == "shared" else value

        return st.builds(
            make, shapes, st.sampled_from(DTYPES),
            st.sampled_from(["plain", "view", "transposed", "shared", "part", "part"]),
        )  # fmt: skip

    leaves = st.one_of(tensor(), st.integers(), st.text(max_size=3), st.none(), st.floats(-1, 1))
    trees = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.builds(OrderedDict, st.dictionaries(st.integers(), inner, max_size=2)),
            st.tuples(inner, inner),
        ),
        max_leaves=8,
    )  # fmt: skip
    return draw(trees)


def saved(state: Any) -> Any:
    """A state as it comes back from a file: what a checkpoint would have been."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
            and a.requires_grad == b.requires_grad and torch.equal(a, b)
        )  # fmt: skip
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def spoil(state: Any) -> None:
    """Change every tensor and map of a state in place."""
    if isinstance(state, torch.Tensor):
        with torch.no_grad():
            state.fill_(1) if state.dtype != torch.bool else state.logical_not_()
    elif isinstance(state, dict):
        for value in state.values():
            spoil(value)
        state.clear()
    elif isinstance(state, (list, tuple)):
        for value in state:
            spoil(value)


@settings(max_examples=150, deadline=None)
@given(st.lists(states(), min_size=1, max_size=3), st.lists(states(), min_size=1, max_size=2))
def test_a_snapshot_is_what_would_have_been_saved_then(first: list[Any], second: list[Any]) -> None:
    """Also from an arena that was used before, and whatever becomes of the state afterwards."""
    arena = HostArena()
    for given_states in (second, first):
        expected = saved(given_states)
        found = arena.snapshot(given_states)
        spoil(given_states)
        assert equal(saved(found), expected)


def test_one_tensor_in_two_places_stays_one() -> None:
    weight = torch.nn.Parameter(torch.randn(4))
    found = HostArena().snapshot([{"in": weight, "out": weight}])[0]
    assert found["in"] is found["out"]
    tied = HostArena().snapshot([{"in": weight.data, "out": weight.data}])[0]
    assert tied["in"].data_ptr() == tied["out"].data_ptr()


@settings(max_examples=150, deadline=None)
@given(states())
def test_a_standalone_state_is_the_same_without_what_is_not_in_it(given_state: Any) -> None:
    found = standalone(given_state)
    assert equal(saved(found), saved(given_state))
    for tensor in tensors_in(found):
        if tensor.is_contiguous():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_memory_that_several_tensors_show_is_copied_once() -> None:
    """Weights, and the flat tensor that they are parts of; a file gets no more than each tensor."""
    flat = torch.randn(1_000_000)
    state = {"a": flat[:400_000].view(400, 1000), "b": flat[400_000:], "flat": flat}
    arena = HostArena()
    found = arena.snapshot([state])[0]
    assert found["a"].data_ptr() == found["flat"].data_ptr()
    assert arena._memory is not None
    assert arena._memory.numel() < 1.1 * 4 * len(flat)
    assert equal(saved(found), saved(state))
    file = io.BytesIO()
    torch.save(found["a"], file)
    assert len(file.getvalue()) < 1.1 * 4 * 400_000


def test_the_first_copy_into_prepared_memory_meets_no_new_pages() -> None:
    """Counted by the system: a page fault for each page that was never touched."""
    state = {"a": torch.randn(2**24), "b": torch.randn(100)}
    faults = []
    for prepared in (False, True):
        arena = HostArena()
        if prepared:
            arena.prepare([state])
            assert arena._growing is not None
            arena._growing.join()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert torch.equal(arena.snapshot([state])[0]["a"], state["a"])
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[1] < 1000
    assert faults[0] > 10 * faults[1] or faults[0] < 1000  # where pages are huge there are few


def test_a_state_that_outgrew_what_was_prepared_is_copied_all_the_same() -> None:
    arena = HostArena()
    arena.prepare([{"a": torch.randn(10)}])
    state = {"a": torch.randn(100_000)}
    assert equal(arena.snapshot([state])[0], state)


def test_memory_is_kept_for_the_next() -> None:
    arena, state = HostArena(), {"a": torch.randn(1000)}
    places = {arena.snapshot([state])[0]["a"].data_ptr() for _ in range(3)}
    assert len(places) == 1
