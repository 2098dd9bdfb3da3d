"""Items in order, few under way; who dies is told of, and nobody outlives the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import psutil
import pytest

from arctic_like.data.workers import AHEAD, in_processes
from arctic_like.errors import RecipeError, RunError


def workers() -> list[psutil.Process]:
    """Forks of this process that live. Other tests in it may have started programs that stay (wandb's)."""
    me = psutil.Process()
    return [child for child in me.children() if child.name() == me.name()]


def test_in_order_and_bounded():
    asked = []

    def items():
        for number in range(40):
            asked.append(number)
            yield number

    def work(number):
        time.sleep(0.002 * (number % 3))
        return number, os.getpid()

    found = []
    for number, pid in in_processes(work, items(), processes=3):
        found.append((number, pid))
        assert len(asked) - len(found) < 3 * AHEAD
    assert [number for number, _ in found] == list(range(40))
    assert len({pid for _, pid in found} - {os.getpid()}) == 3
    assert not workers()


def test_large_items_and_results_do_not_lock_each_other():
    blocks = [bytes([n]) * 3_000_000 for n in range(12)]
    assert list(in_processes(lambda block: block * 2, blocks, processes=2)) == [
        b * 2 for b in blocks
    ]


def test_errors_arrive_in_their_place():
    def work(number):
        if number == 5:
            raise RecipeError("no good")
        return number

    found = []
    with pytest.raises(RecipeError, match="no good") as caught:
        found.extend(in_processes(work, range(20), processes=2))
    assert found == [0, 1, 2, 3, 4]
    assert "in work" in "".join(caught.value.__notes__)
    assert not workers()


def test_what_cannot_be_pickled_is_told_as_text():
    class Odd(Exception):
        pass

    def work(_):
        raise Odd("strange")

    with pytest.raises(RuntimeError, match="strange"):
        list(in_processes(work, range(3), processes=2))


@pytest.mark.parametrize(("how", "told"), [("kill", "ended by SIGKILL"), ("exit", "exit code 3")])
def test_a_death_is_told(how, told):
    def work(number):
        if number == 7:
            if how == "exit":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(RunError, match=told):
        list(in_processes(work, range(50), processes=2))
    assert not workers()


def test_stopping_early_ends_them():
    results = in_processes(lambda number: number, range(1000), processes=2)
    assert next(results) == 0
    assert workers()
    results.close()
    assert not workers()


def test_they_end_with_a_parent_that_is_killed(tmp_path):
    def parent():
        def work(number):
            (tmp_path / str(os.getpid())).touch()
            time.sleep(0.02)
            return number

        for _ in in_processes(work, range(10_000), processes=3):
            pass

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    while len(list(tmp_path.iterdir())) < 3:
        time.sleep(0.02)
    workers = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]
