"""Entries are whole or absent; one process prepares, others wait; a crash is in nobody's way."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from arctic_like.data import cache
from arctic_like.errors import RecipeError, RunError

FORK = multiprocessing.get_context("fork")


def write(folder: Path):
    (folder / "data").write_text("x")
    return {"answer": 42}


def test_prepared_once(tmp_path):
    calls = []

    def prepare(folder):
        calls.append(folder)
        return write(folder)

    for _ in range(3):
        entry = cache.obtain(tmp_path / "kind", "key", prepare)
    assert len(calls) == 1
    assert (entry / "data").read_text() == "x"
    assert cache.facts(entry) == {"answer": 42}
    assert sorted(p.name for p in entry.parent.iterdir()) == ["key", "key.lock"]


def test_missing(tmp_path):
    with pytest.raises(
        RecipeError, match=r"fail_on_missing_cache: train\.jsonl is not in the cache"
    ):
        cache.obtain(tmp_path, "key", write, missing_ok=False, what="train.jsonl")
    assert not list(tmp_path.iterdir())
    cache.obtain(tmp_path, "key", write)
    cache.obtain(tmp_path, "key", write, missing_ok=False)


def test_a_failure_leaves_nothing_and_may_be_tried_again(tmp_path):
    def broken(folder):
        write(folder)
        raise RecipeError("no good")

    with pytest.raises(RecipeError, match="no good"):
        cache.obtain(tmp_path, "key", broken)
    assert not (tmp_path / "key").exists()
    assert not list(tmp_path.glob("*tmp*"))
    assert cache.obtain(tmp_path, "key", write).is_dir()
    assert not (tmp_path / "key.error").exists()


def race(tmp_path, prepare, count=4):
    """What several processes that start together say: "done", or the error."""

    def ask(queue, start):
        start.wait()
        try:
            cache.obtain(tmp_path, "key", prepare)
            queue.put("done")
        except Exception as error:
            queue.put(f"{type(error).__name__}: {error}")

    queue, start = FORK.Queue(), FORK.Event()
    processes = [FORK.Process(target=ask, args=(queue, start)) for _ in range(count)]
    for process in processes:
        process.start()
    start.set()
    said = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    return said


def log(tmp_path):
    with (tmp_path / "calls").open("a") as file:
        file.write(f"{os.getpid()}\n")


def test_one_prepares_others_wait(tmp_path):
    def slow(folder):
        log(tmp_path)
        time.sleep(0.5)
        return write(folder)

    assert race(tmp_path, slow) == ["done"] * 4
    assert len((tmp_path / "calls").read_text().split()) == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [(RecipeError("bad row"), "RecipeError: bad row"), (OSError("no disk"), "RunError")],
)
def test_those_that_wait_hear_of_a_failure(tmp_path, error, told):
    def failing(folder):
        log(tmp_path)
        time.sleep(0.5)
        raise error

    said = race(tmp_path, failing)
    assert len((tmp_path / "calls").read_text().split()) == 1
    assert sum(one.startswith(told) for one in said) >= 3, said
    assert all(str(error) in one for one in said)


def test_a_killed_process_is_in_nobodys_way(tmp_path):
    def slow(folder):
        write(folder)
        (tmp_path / "started").touch()
        time.sleep(60)
        return {}

    victim = FORK.Process(target=cache.obtain, args=(tmp_path, "key", slow))
    victim.start()
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert list(tmp_path.glob("key.tmp-*"))
    entry = cache.obtain(tmp_path, "key", write)
    assert cache.facts(entry) == {"answer": 42}
    assert not list(tmp_path.glob("key.tmp-*"))


def test_an_old_failure_is_no_failure(tmp_path):
    failure = {"message": "old", "exit_code": 2, "by": "x", "time": time.time() - 1}
    (tmp_path / "key.error").write_text(json.dumps(failure))
    assert cache.obtain(tmp_path, "key", write).is_dir()


def test_a_failure_of_the_run_is_not_one_of_the_recipe(tmp_path):
    entry = tmp_path / "key"
    failure = {"message": "OSError: disk", "exit_code": 1, "by": "host, process 1", "time": 10}
    (tmp_path / "key.error").write_text(json.dumps(failure))
    with pytest.raises(RunError, match="preparing data failed on host, process 1: OSError: disk"):
        cache._raise_failure(entry, since=5)


def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cache.ENVIRONMENT, raising=False)
    assert cache.root(None) == tmp_path / "arctic_like"
    monkeypatch.setenv(cache.ENVIRONMENT, "/somewhere")
    assert cache.root(None) == Path("/somewhere")
    assert cache.root(tmp_path / "mine") == tmp_path / "mine"
