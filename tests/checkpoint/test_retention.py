"""What stays: numbers decide, and no kill at any file operation costs the newest or the best."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from arctic_like.checkpoint.base import CheckpointConfig, CheckpointEngine
from arctic_like.checkpoint.layout import (
    BEST,
    LATEST,
    RUN_STATE,
    complete_checkpoints,
    missing_files,
    newest,
    step_of,
)
from arctic_like.checkpoint.publish import (
    aside,
    files_below,
    publish,
    recover,
    seal,
    supersede_after,
)
from arctic_like.checkpoint.retention import (
    MONITORED,
    Monitored,
    Retention,
    best_checkpoint,
    milestones,
    ranked,
    recorded,
)
from tests.checkpoint.kills import Killed, killed_after

METRIC = "eval/loss"


def save(checkpoints: Path, step: int, value: float | None, mode: Any, **config: Any) -> None:
    """What the `deepspeed` engine does with files, without a model."""
    monitored = Monitored.of(METRIC, mode, value)
    directory = checkpoints / f"step-{step}"
    partial = aside(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "engine").mkdir(parents=True)
    (partial / RUN_STATE).write_text(json.dumps({MONITORED: monitored.as_dict()}))
    (partial / "engine" / "weights").write_text(f"weights of {step}")
    publish(directory, seal(partial, files_below(partial)))
    engine = CheckpointEngine(CheckpointConfig(**config))
    engine.let_go(complete_checkpoints(checkpoints), monitored, steps_per_epoch=7, total_steps=2000)


def steps_in(checkpoints: Path) -> list[int]:
    return [step_of(path) or 0 for path in complete_checkpoints(checkpoints)]


def best_step(values: dict[int, float | None], mode: str) -> int | None:
    """Computed by looking at one after another, as one would by hand."""
    best: tuple[int, float] | None = None
    for step in sorted(values):
        value = values[step]
        if value is None or not math.isfinite(value):
            continue
        if best is None or (value < best[1] if mode == "min" else value > best[1]):
            best = (step, value)
    return best[0] if best else None


@st.composite
def courses(draw: st.DrawFn) -> tuple[list[tuple[int, float | None]], str, dict[str, Any]]:
    """Some saved steps that pass 9, 99 or 999, their metric, its direction and what the recipe keeps."""
    start = draw(st.sampled_from([1, 8, 97, 998]))
    gaps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    steps = [start + sum(gaps[:i]) for i in range(len(gaps) + 1)]
    metric = st.one_of(
        st.none(), st.just(math.nan), st.just(0.0), st.just(-0.0), st.just(math.inf),
        st.sampled_from([-1.5, -1.0, 1.0, 2.0]), st.floats(-3, 3),
    )  # fmt: skip
    config = {
        "keep_last": draw(st.sampled_from([1, 1, 2, None])),
        "keep_best": draw(st.integers(1, 2)),
        "keep_every": draw(st.sampled_from([0, 5, "1 epoch", "10%"])),
    }
    return [(s, draw(metric)) for s in steps], draw(st.sampled_from(["min", "max"])), config


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
)  # fmt: skip
@given(courses(), st.data())
def test_a_kill_at_any_file_operation_costs_neither_the_newest_nor_the_best(
    course: tuple[list[tuple[int, float | None]], str, dict[str, Any]], data: st.DataObject
) -> None:
    """Of every course: the last save is killed at each of its file operations in turn; then recovery is
    killed as well, and done again."""
    saves, mode, config = course
    *before, (step, value) = saves
    with tempfile.TemporaryDirectory() as temporary:
        kept, place = Path(temporary) / "kept", Path(temporary) / "checkpoints"
        kept.mkdir()
        for earlier, metric in before:
            save(kept, earlier, metric, mode, **config)
        known = dict(before)
        again = data.draw(st.booleans(), "the last step is saved again")
        if again:
            save(kept, step, value, mode, **config)
            known[step] = value
        shutil.copytree(kept, place)
        with killed_after(None, place) as whole:
            save(place, step, value, mode, **config)
        assert whole.count > 8
        for operation in range(whole.count + 1):
            shutil.rmtree(place)
            shutil.copytree(kept, place)
            killed = False
            with killed_after(operation, place):
                try:
                    save(place, step, value, mode, **config)
                except Killed:
                    killed = True
            assert killed == (operation < whole.count)
            with killed_after(data.draw(st.integers(0, 12)), place), contextlib.suppress(Killed):
                recover(place)
            recover(place)
            left = steps_in(place)
            last = max([*known, step] if step in left else known)
            assert left[-1] == last
            assert (place / LATEST).read_text().strip() == f"step-{last}"
            seen = known | ({step: value} if step in left else {})
            best = best_step(seen, mode)
            if best is None:
                assert not (place / BEST).exists()
                assert best_checkpoint(place) is None
            else:
                assert best in left
                assert (place / BEST).read_text().strip() == f"step-{best}"
                assert best_checkpoint(place) == place / f"step-{best}"
            there = [p for p in place.iterdir() if p.is_dir()]
            assert len(there) == len(left)  # nothing half-removed is left behind
            assert all(not missing_files(path) for path in there)
            assert not [p for p in place.iterdir() if p.name.endswith((".partial", ".replaced"))]


@given(
    st.dictionaries(st.integers(0, 1200), st.one_of(st.none(), st.floats()), min_size=1, max_size=12),
    st.sampled_from(["min", "max"]), st.integers(1, 4), st.integers(0, 4), st.integers(0, 200),
)  # fmt: skip
def test_what_is_kept(
    values: dict[int, float | None], mode: Any, last: int, best: int, period: int
) -> None:
    """Against the definition; and what stays does not depend on when it was asked."""
    kept = Retention(last, best, Fraction(period)).kept(values, mode)
    steps = sorted(values)
    assert set(steps[-last:]) <= kept
    first = best_step(values, mode)
    assert best == 0 or first is None or first in kept
    finite = {s: v for s, v in values.items() if v is not None and math.isfinite(v)}
    order = ranked(values, mode)
    assert sorted(order) == sorted(finite)
    assert order[:1] == ([first] if first is not None else [])
    assert set(order[:best]) <= kept
    assert len(kept) <= last + best + len(milestones(steps, period))
    again = Retention(last, best, Fraction(period)).kept({s: values[s] for s in kept}, mode)
    assert again == kept


def test_milestones_stay_as_steps_pass(tmp_path: Path) -> None:
    """Saved every 3 steps; the first at or after each multiple of 10 is permanent. Names would say
    that step-9 is newer than step-12 and step-102."""
    for step in range(3, 106, 3):
        save(tmp_path, step, None, "min", keep_last=1, keep_every=10)
    assert steps_in(tmp_path) == [12, 21, 30, 42, 51, 60, 72, 81, 90, 102, 105]
    assert milestones([3, 6, 9, 10, 11, 20, 99, 100, 101], 10) == {10, 20, 99, 100}
    assert milestones(range(50), Fraction(49, 2)) == {25, 49}
    assert milestones(range(9), 0) == set()


def test_the_top_two_and_the_last_two(tmp_path: Path) -> None:
    values = [-1.0, -3.0, -3.0, math.nan, 0.0, None, -2.0]
    for step, value in zip([8, 9, 10, 11, 98, 99, 100], values, strict=True):
        save(tmp_path, step, value, "min", keep_last=2, keep_best=2)
    assert steps_in(tmp_path) == [9, 10, 99, 100]
    assert (tmp_path / BEST).read_text() == "step-9\n"


def test_by_default_all_stay_and_the_best_outlives_keep_last(tmp_path: Path) -> None:
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
        save(tmp_path / "all", step, value, "min")
        save(tmp_path / "one", step, value, "min", keep_last=1)
        save(tmp_path / "strict", step, value, "min", keep_last=1, keep_best=0)
        save(tmp_path / "best", step, value, "max", keep_best=1)
    assert steps_in(tmp_path / "all") == [1, 2, 3, 4]
    assert steps_in(tmp_path / "one") == [2, 4]
    assert steps_in(tmp_path / "strict") == [4]
    assert steps_in(tmp_path / "best") == [4]


def test_another_metric_is_not_compared(tmp_path: Path) -> None:
    """A run that goes on with another `metric_monitor` does not rank losses among accuracies."""
    save(tmp_path, 1, 0.01, "max")
    state = tmp_path / "step-2"
    save(tmp_path, 2, 5.0, "max")
    text = (state / RUN_STATE).read_text().replace(METRIC, "eval/other")
    (state / RUN_STATE).write_text(text)
    save(tmp_path, 3, 0.005, "max", keep_last=1)
    assert steps_in(tmp_path)[0] == 1
    assert (tmp_path / BEST).read_text() == "step-1\n"


def test_a_course_that_is_given_up_takes_its_best_along(tmp_path: Path) -> None:
    for step, value in ((1, 3.0), (2, 2.0), (3, 1.0)):
        save(tmp_path, step, value, "min")
    assert supersede_after(tmp_path / "step-2") == ["step-3"]
    assert (tmp_path / BEST).read_text() == "step-2\n"
    assert (tmp_path / LATEST).read_text() == "step-2\n"


def test_a_checkpoint_without_its_marker_is_left_alone_and_does_not_count(tmp_path: Path) -> None:
    """No kill leaves one: the marker is inside before the folder gets its name."""
    save(tmp_path, 1, 1.0, "min")
    save(tmp_path, 2, 0.5, "min")
    (tmp_path / "step-2" / "complete.json").unlink()
    assert recover(tmp_path) == []
    assert newest(tmp_path) == tmp_path / "step-1"
    assert best_checkpoint(tmp_path) == tmp_path / "step-1"
    assert (tmp_path / "step-2" / "engine" / "weights").is_file()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_not_recorded(tmp_path: Path, value: float | None) -> None:
    save(tmp_path, 1, value, "min")
    assert recorded(tmp_path / "step-1") == Monitored(METRIC, "min", None)
    json.loads((tmp_path / "step-1" / RUN_STATE).read_text(), parse_constant=pytest.fail)
