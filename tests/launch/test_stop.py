"""Stop requests: the command's file, and signals caught in somebody's own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from arctic_like import stop as module
from arctic_like.stop import StopRequest, catch_signals, report_exit


def test_the_file_asks(tmp_path):
    stop = StopRequest(tmp_path / "stop")
    assert stop.requested() == 0
    (tmp_path / "stop").write_text("2")
    assert stop.requested() == 2
    (tmp_path / "stop").unlink()
    assert stop.requested() == 2


@pytest.mark.parametrize("content", ["", "please"])
def test_a_file_made_by_hand_asks_as_sigterm(tmp_path, content):
    (tmp_path / "stop").write_text(content)
    assert StopRequest(tmp_path / "stop").requested() == signal.SIGTERM


def test_without_a_command_nobody_asks(monkeypatch):
    monkeypatch.delenv("ARCTIC_STOP_FILE", raising=False)
    assert StopRequest.from_environment().requested() == 0


def test_first_signal_is_a_request_and_the_second_is_not(monkeypatch):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with catch_signals(StopRequest()) as stop:
        assert stop.requested() == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {s: signal.getsignal(s) for s in before} == before


def test_handlers_come_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals(StopRequest()):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_do_without():
    failed = []

    def body():
        try:
            with catch_signals(StopRequest()) as stop:
                assert stop.requested() == 0
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not failed


def test_no_control_folder_no_report(monkeypatch, tmp_path):
    monkeypatch.delenv("ARCTIC_CONTROL_DIR", raising=False)
    report_exit(1)
    monkeypatch.setenv("ARCTIC_CONTROL_DIR", str(tmp_path / "gone"))
    report_exit(1)


DAEMON = """
import os, subprocess, sys, time
leader = '''
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
'''
rank = '''
import os, time
from arctic_like.stop import install_rank_guards
install_rank_guards()
print(os.getpid(), flush=True)
time.sleep(60)
'''
subprocess.run([sys.executable, "-c", leader, rank], start_new_session=True)
"""


def test_a_rank_notices_that_the_remote_daemon_is_gone():
    """As on another node: daemon (ssh) → leader of a session → rank; only the daemon is killed."""
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    rank = int(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    end = time.monotonic() + 3
    while module._parent_of(rank):
        assert time.monotonic() < end, "the rank lives on"
        time.sleep(0.05)
