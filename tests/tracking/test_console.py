"""What the console shows: figures, plain lines at sensible times, the summary."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from arctic_like import logs
from arctic_like.registry import lookup
from arctic_like.tracking.console import ConsoleConfig, ConsoleTracker, Progress
from arctic_like.tracking.summary import SummaryRow, show_summary


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("arctic_like.tracking.console.time.monotonic", clock)
    monkeypatch.setattr(Progress, "__init__", _with_clock(Progress.__init__, clock))
    return clock


def _with_clock(make, clock):
    def init(self, total, **more):
        make(self, total, **{"clock": clock, **more})

    return init


@pytest.fixture
def out(monkeypatch):
    """The console as a pipe would see it."""
    stream = io.StringIO()
    monkeypatch.setattr(logs, "_console", Console(file=stream, width=80, highlight=False))
    return stream


def tracker(total, **config):
    made = ConsoleTracker(ConsoleConfig(type="console", **config))
    made.start(run_name="r", recipe={}, output_dir=Path(), total_steps=total, state={})
    return made


LINE = {"loss": 2.34567, "learning_rate": 3e-4, "tokens_per_second": 12345.6, "grad_norm": 1.0}


def test_it_is_found_by_name():
    assert lookup("tracker", "console") is ConsoleTracker


def test_about_every_five_percent(out, clock):
    shown = tracker(1000)
    for step in range(1, 1001):
        clock.now += 0.01
        shown.scalars(step, LINE)
    shown.finish(0)
    lines = out.getvalue().splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[0] == "step 1/1000  loss 2.3457  lr 3.00e-04  12.3k tokens/s"
    assert lines[-1] == "step 1000/1000  loss 2.3457  lr 3.00e-04  12.3k tokens/s  0:00 left"


def test_a_pipe_is_told_what_holds_a_step_up_and_a_terminal_all_phases(out, clock):
    times = {"time/data": 0.34, "time/forward": 0.2, "time/backward": 0.39, "time/optimizer": 0.06,
             "time/other": 0.01, "time/checkpoint": 9.0}  # fmt: skip
    line = {**LINE, "step_time": 1.0, **times}
    tracker(1000).scalars(1, line)
    assert out.getvalue() == "step 1/1000  loss 2.3457  lr 3.00e-04  12.3k tokens/s  data 34%\n"
    progress = Progress(10, clock=clock)
    progress.update(1, line)
    assert progress.phases() == ["data 34%", "forward 20%", "backward 39%", "optimizer 6%"]


def test_a_slow_run_speaks_every_ten_seconds_and_later_less(out, clock):
    shown = tracker(10**6)
    at = []
    for step in range(1, 24 * 3600):
        clock.now += 1
        before = out.tell()
        shown.scalars(step, LINE)
        if out.tell() > before:
            at.append(clock.now)
    assert at[1] - at[0] == 10
    assert at[-1] - at[-2] > 600
    assert 150 < len(at) < 400


def test_time_left_counts_from_the_resumed_step(clock):
    progress = Progress(100, clock=clock)
    progress.update(40, {"eval/loss": 2.0})
    for step in range(41, 52):
        progress.update(step, LINE)
        clock.now += 3
    clock.now -= 3
    assert progress.seconds_left() == pytest.approx(3 * 49)


def test_evaluations_are_shown_at_once_within_80_columns_without_escapes(out, clock):
    shown = tracker(100)
    values = {f"eval/exact_match/kind_{i}": i / 7 for i in range(9)}
    shown.scalars(0, {**values, "eval/loss": float("nan")})
    shown.finish(1)
    text = out.getvalue()
    assert text.startswith("step 0/100  eval/exact_match/kind_0 0")
    assert "eval/exact_match/kind_8 1.143" in text
    assert "eval/loss nan" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_unknown_end_and_switched_off(out, clock):
    tracker(None).scalars(3, LINE)
    assert out.getvalue().startswith("step 3  loss")
    size = out.tell()
    tracker(10, enabled=False).scalars(3, LINE)
    assert out.tell() == size


def test_summary(out):
    rows = [SummaryRow("exact match", 0.0, 0.97123), SummaryRow("loss", None, 0.5)]
    show_summary(rows=rows, run_directory=Path("runs/one"), next_commands=["arctic-train chat x"])
    words = out.getvalue().split()
    assert words[:2] == ["before", "after"]
    assert words[2:6] == ["exact", "match", "0", "0.9712"]
    assert words[6:9] == ["loss", "-", "0.5"]
    assert "runs/one" in words
    assert out.getvalue().rstrip().endswith("arctic-train chat x")


SCRIPT = """
import logging, time
from pathlib import Path
from loguru import logger
from arctic_like.logs import setup_logging
from arctic_like.tracking.console import ConsoleConfig, ConsoleTracker
setup_logging()
tracker = ConsoleTracker(ConsoleConfig(type="console", refresh_per_second=20))
tracker.start(run_name="r", recipe={}, output_dir=Path(), total_steps=20, state={})
for step in range(1, 21):
    time.sleep(0.02)
    tracker.scalars(step, {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 5.0})
    if step == 10:
        logger.warning("half way")
tracker.finish(0)
"""


def test_a_terminal_gets_a_live_display_that_messages_do_not_tear():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=theirs, env=environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    assert process.wait() == 0
    shown = text.decode()
    assert shown.count("\x1b[2K") > 3  # redrawn in place
    assert "step 20/20" in shown
    # The message begins where the display was erased, and ends its own line.
    before, _, after = shown.partition("warning: half way")
    assert before.endswith(("\x1b[2K\x1b[33m", "\x1b[2K"))
    assert after.startswith(("\x1b[0m\r\n", "\r\n"))
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back
