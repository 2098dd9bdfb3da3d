"""A function over many items by several processes: in order, with few items under way.

Each process has a pipe of its own, and gets every n-th item. Why not `concurrent.futures`: there, a
process that is killed while it holds the queue's lock leaves the others hanging, and processes
outlive a parent that is killed. Here the end of a pipe tells either side that the other is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, TypeVar

from arctic_like.errors import RunError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items that a process has at once: one that it works on, the others so that it need not wait."""

_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[Item], Result], items: Iterable[Item], *, processes: int
) -> Iterator[Result]:
    """`work` of each item, in their order.

    The processes are forked when they are first needed, so `work` may hold whatever memory can;
    items and results are pickled. Items are asked for as processes become free: at most `AHEAD` for
    each are under way. Raises what `work` raised, RunError if a process is gone.
    """
    workers: list[_Worker] = []
    try:
        sent = done = 0
        for item in items:
            if len(workers) < processes:
                workers.append(_Worker(work, workers))
            workers[sent % processes].send(item)
            sent += 1
            if sent - done == AHEAD * processes:
                yield workers[done % processes].receive()
                done += 1
        while done < sent:
            yield workers[done % processes].receive()
            done += 1
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    def __init__(self, work: Callable[[Any], Any], others: Sequence[_Worker]) -> None:
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        # a child that held another's pipe open would keep that one alive after this process
        inherited = [self._pipe, *(other._pipe for other in others)]
        self._process = context.Process(
            target=_serve, args=(work, theirs, inherited), name="tokenise", daemon=True
        )
        with _quiet_fork():
            self._process.start()
        theirs.close()

    def send(self, item: Any) -> None:
        with self._gone():
            self._pipe.send_bytes(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> Any:
        with self._gone():
            content = self._pipe.recv_bytes()
        fine, result = pickle.loads(content)
        if not fine:
            raise result
        return result

    @contextlib.contextmanager
    def _gone(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            self._process.join(10)
            code = self._process.exitcode
            if code is not None and code < 0:
                how = f"was ended by {signal.Signals(-code).name}"
                hint = "the system ends processes that take too much memory: lower data.num_proc"
            else:
                how, hint = f"ended with exit code {code}", "start again: it goes on where it was"
            raise RunError(f"a process that tokenises {how}\n    {hint}") from error

    def end(self) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join(5)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()


@contextlib.contextmanager
def _quiet_fork() -> Iterator[None]:
    """The `tokenizers` library warns of a fork unless it was told how to go on."""
    before = os.environ.get(_TOKENIZER_THREADS)
    os.environ.setdefault(_TOKENIZER_THREADS, "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TOKENIZER_THREADS]


def _serve(work: Callable[[Any], Any], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """The child: one item after another until the parent closes the pipe, or is gone."""
    import gc

    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ[_TOKENIZER_THREADS] = "false"  # there is a process for every core
    gc.freeze()  # a collection would touch, and so copy, all that the parent has
    items: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        # always ready to read: else both sides could wait until the other takes what it sends
        while True:
            try:
                items.put(pipe.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            answer = (True, work(pickle.loads(items.get())))
        except BaseException as error:
            answer = (False, _sendable(error))
        try:
            pipe.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
        except OSError:
            os._exit(0)


def _sendable(error: BaseException) -> BaseException:
    """An error that can be pickled and says where it was raised."""
    where = "".join(traceback.format_exception(error))
    error.add_note(f"in a process that tokenises:\n{where}")
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError(where)
