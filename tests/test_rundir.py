"""The run directory: one owner, atomic files, refusals with ways out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from arctic_like.errors import RecipeError, RunError
from arctic_like.rundir import RunDirectory, git_revision, write_atomically

HOLD = """
import sys, time
from pathlib import Path
from arctic_like.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path):
    return RunDirectory(tmp_path / "runs" / "one")


def holder(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory.path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_one_run_owns_it_at_a_time(directory):
    process = holder(directory)
    try:
        with pytest.raises(RunError, match=f"process {process.pid}"), directory.lock(wait=0.1):
            pass
    finally:
        process.kill()
        process.wait()
    with directory.lock(wait=2):
        pass
    with directory.lock(wait=0):
        pass


def test_two_runs_in_one_process(directory):
    other = RunDirectory(directory.path)
    with directory.lock(), pytest.raises(RunError, match="goes on"), other.lock(wait=0.1):
        pass


def test_a_forked_child_does_not_keep_the_lock(directory):
    with directory.lock():
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with directory.lock(wait=2):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_looking_writes_nothing(directory, tmp_path):
    directory.check(resume=False, overwrite=False)
    assert not directory.holds_run()
    assert directory.starts() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["recipe", "metrics", "checkpoint"])
def test_a_run_over_a_run_is_refused_with_the_ways_out(directory, what):
    directory.path.mkdir(parents=True)
    if what == "checkpoint":
        (directory.checkpoints / "step-1").mkdir(parents=True)
    else:
        getattr(directory, what).write_text("")
    with pytest.raises(RecipeError) as caught:
        directory.check(resume=False, overwrite=False)
    for way_out in (f"arctic-train resume {directory.path}", "output_dir", "overwrite=true"):
        assert way_out in str(caught.value)
    directory.check(resume=True, overwrite=False)
    directory.check(resume=False, overwrite=True)


def test_a_lock_or_a_foreign_file_is_no_run(directory):
    with directory.lock():
        (directory.path / "notes.txt").write_text("mine")
        assert not directory.holds_run()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="not a folder"):
        RunDirectory(tmp_path / "file" / "run").check(resume=False, overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RecipeError, match="cannot be written"):
        RunDirectory(tmp_path / "closed" / "run").check(resume=False, overwrite=False)


def test_clear_removes_the_run_alone(directory, tmp_path):
    elsewhere = tmp_path / "fast disk"
    for folder in (directory.checkpoints / "step-1", directory.logs, elsewhere / "step-3"):
        folder.mkdir(parents=True)
    for file in ("recipe.yaml", "metrics.jsonl", "environment.json", "notes.txt"):
        (directory.path / file).write_text("")
    (elsewhere / "latest").write_text("step-3")
    (elsewhere / "data.bin").write_text("")
    directory.clear(elsewhere)
    assert [p.name for p in directory.path.iterdir()] == ["notes.txt"]
    assert [p.name for p in elsewhere.iterdir()] == ["data.bin"]


def test_environment_keeps_one_entry_for_each_start(directory, monkeypatch):
    monkeypatch.setenv("ARCTIC_COMMAND", "arctic-train recipe.yaml")
    directory.write_environment(world_size=2, devices=["cpu", "cpu"])
    directory.write_environment(world_size=1, devices=["cpu"], resumed_from="step-4")
    first, second = json.loads(directory.environment.read_text())["starts"]
    assert (first["world_size"], first["resumed_from"]) == (2, None)
    assert (second["world_size"], second["resumed_from"]) == (1, "step-4")
    assert first["command"] == "arctic-train recipe.yaml"
    import torch

    assert first["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert first["python"] == sys.version.split()[0]


def test_git_revision(tmp_path):
    assert git_revision(tmp_path) is None

    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()  # fmt: skip

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == {"revision": git("rev-parse", "HEAD"), "dirty": True}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write_atomically(path, "old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_heavy_import():
    code = "import sys, arctic_like.rundir; print({'torch', 'deepspeed'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
