"""metrics.jsonl: exact numbers, and a resume that leaves no step twice."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_like.errors import RunError
from arctic_like.tracking.metrics_file import MetricsFile, read_metrics

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def same(a, b):
    """Equal with NaN equal to NaN, and -0.0 told from 0.0."""
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a.hex() == b.hex())
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=5))
def test_what_is_written_is_read(lines):
    names = {"NaN", "Infinity", "-Infinity"}

    def plain(value):
        return value if value not in names else "other"

    lines = [{k: plain(v) if isinstance(v, str) else v for k, v in x.items()} for x in lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        file = MetricsFile(path)
        for line in lines:
            file.write(line)
        file.close()
        text = path.read_text()

        def refuse(name):
            raise AssertionError(f"{name} is not JSON")

        for line in text.splitlines():
            json.loads(line, parse_constant=refuse)
        read = read_metrics(path)
        if not any(_holds_name(line, names) for line in lines):
            assert same(read, lines)


def _holds_name(value, names):
    if isinstance(value, dict):
        return any(_holds_name(v, names) for v in value.values())
    if isinstance(value, list):
        return any(_holds_name(v, names) for v in value)
    return isinstance(value, str) and value in names


def test_numpy_scalars(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"step": np.int64(3), "loss": np.float32(0.1), "norm": np.float64("nan")})
    line = read_metrics(tmp_path / "m.jsonl")[0]
    assert line["step"] == 3
    assert line["loss"] == float(np.float32(0.1))
    assert math.isnan(line["norm"])


def run(file: MetricsFile, begin: int, end: int, *, save_every: int, eval_every: int = 0, salt=""):
    """Steps begin+1..end as a trainer writes them; returns {step: offset} of the saves."""
    saves = {}
    for step in range(begin + 1, end + 1):
        file.write({"step": step, "loss": 1 / step, "salt": salt})
        if eval_every and step % eval_every == 0:
            file.write({"step": step, "eval/loss": 2 / step, "salt": salt})
        if step % save_every == 0:
            saves[step] = file.sync()
    return saves


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_killed_anywhere_and_resumed_is_the_uninterrupted_file(data):
    steps, save_every = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    eval_every = data.draw(st.integers(0, 3))
    with tempfile.TemporaryDirectory() as folder:
        whole, path = Path(folder) / "whole", Path(folder) / "killed"
        run(MetricsFile(whole), 0, steps, save_every=save_every, eval_every=eval_every)
        killed_at = data.draw(st.integers(0, steps))
        saves = run(MetricsFile(path), 0, killed_at, save_every=save_every, eval_every=eval_every)
        step, offset = max(saves.items(), default=(0, 0))
        length = data.draw(st.integers(offset, path.stat().st_size))  # the kill may tear a line
        os.truncate(path, length)
        file = MetricsFile(path)
        assert file.rewind(offset, step).exact
        run(file, step, steps, save_every=save_every, eval_every=eval_every)
        assert path.read_bytes() == whole.read_bytes()


def test_lines_of_redone_steps_give_way_and_the_rest_is_untouched(tmp_path):
    path = tmp_path / "m.jsonl"
    saves = run(MetricsFile(path), 0, 10, save_every=4, salt="old")
    before = path.read_bytes()
    file = MetricsFile(path)
    done = file.rewind(saves[4], 4)
    assert (done.exact, done.dropped) == (True, 6)
    assert path.read_bytes() == before[: saves[4]]
    run(file, 4, 10, save_every=4, salt="new")
    read = read_metrics(path)
    assert [line["step"] for line in read] == list(range(1, 11))
    assert [line["salt"] for line in read] == ["old"] * 4 + ["new"] * 6


@pytest.mark.parametrize("edit", ["shorter", "longer", "reordered", "unknown offset", "garbage"])
def test_an_edited_file_is_cut_by_step(tmp_path, edit):
    path = tmp_path / "m.jsonl"
    saves = run(MetricsFile(path), 0, 6, save_every=4)
    lines = path.read_text().splitlines(keepends=True)
    offset: int | None = saves[4]
    if edit == "shorter":
        lines = lines[:2]
    elif edit == "longer":
        lines[0] = lines[0].replace('"salt": ""', '"salt": "a note by hand"')
    elif edit == "reordered":
        lines = lines[::-1]
    elif edit == "unknown offset":
        offset = None
    else:
        lines.insert(1, "not json\n")
    path.write_text("".join(lines))
    file = MetricsFile(path)
    assert not file.rewind(offset, 4).exact
    run(file, 4, 6, save_every=4)
    steps = [line["step"] for line in read_metrics(path)]
    assert sorted(set(steps)) == sorted(steps)
    assert sorted(steps) == ([1, 2, 5, 6] if edit == "shorter" else [1, 2, 3, 4, 5, 6])


def test_starting_over_empties_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    run(MetricsFile(path), 0, 3, save_every=9)
    MetricsFile(path).rewind(0, 0)
    assert path.read_bytes() == b""


def test_a_torn_line_is_never_continued(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    MetricsFile(path).write({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_line_has_left_the_process_when_write_returns(tmp_path):
    file = MetricsFile(tmp_path / "new" / "m.jsonl")
    file.write({"step": 1})
    assert read_metrics(tmp_path / "new" / "m.jsonl") == [{"step": 1}]
    assert file.sync() == (tmp_path / "new" / "m.jsonl").stat().st_size


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n[]\n')
    with pytest.raises(RunError, match=r"m\.jsonl:2"):
        read_metrics(path)
    with pytest.raises(RunError, match="no such file"):
        read_metrics(tmp_path / "none.jsonl")
