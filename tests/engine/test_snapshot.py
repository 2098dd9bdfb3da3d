"""Snapshots of states: equal to what they were taken from, and apart from it."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.engine.snapshot import HostArena

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64)


@st.composite
def states(draw: st.DrawFn) -> Any:
    """Nested states whose tensors may be views, transposed, shared, empty, scalars or parameters."""
    shared = [
        torch.randn(3, 4),
        torch.nn.Parameter(torch.randn(5), requires_grad=draw(st.booleans())),
    ]

    def tensor() -> st.SearchStrategy[Any]:
        shapes = st.sampled_from([(), (0,), (1,), (7,), (3, 5), (2, 3, 2)])

        def make(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Any:
            value = (torch.rand(shape) * 5).to(dtype)
            if kind == "view" and value.numel() > 2:
                return torch.cat([value.flatten(), value.flatten()])[1 : value.numel()]
            if kind == "transposed" and value.ndim >= 2:
                return value.transpose(0, 1)
            return shared[hash(shape) % 2] if kind == "shared" else value

        return st.builds(
            make, shapes, st.sampled_from(DTYPES),
            st.sampled_from(["plain", "view", "transposed", "shared"]),
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


def test_memory_is_kept_for_the_next() -> None:
    arena, state = HostArena(), {"a": torch.randn(1000)}
    places = {arena.snapshot([state])[0]["a"].data_ptr() for _ in range(3)}
    assert len(places) == 1
