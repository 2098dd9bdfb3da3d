"""Signs of life: a file that others may watch, and a watch of one's own that tells where a run hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanFloat, RecipePath
from arctic_like.errors import FAILED
from arctic_like.stop import report_exit

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer


class HeartbeatConfig(CallbackConfig):
    """`type: heartbeat`."""

    type: str = "heartbeat"

    file: RecipePath | None = None
    """The file; `heartbeat.json` in the run directory unless given."""

    every: Annotated[HumanFloat, Field(ge=0)] = 10.0
    """Write it at most every so many seconds."""


class Heartbeat(Callback):
    """`type: heartbeat`: a small file with step, moment and time (seconds since 1970), never half written.

    Touched by steps, evaluation batches and checkpoints; removed by nobody, its `moment` says `end` or
    `error` when the run is over.
    """

    name = "heartbeat"
    config_type = HeartbeatConfig
    config: HeartbeatConfig
    main_rank_only = True

    def __init__(self, config: HeartbeatConfig) -> None:
        super().__init__(config)
        self._last = -float("inf")

    def beat(self, trainer: Trainer, moment: str, *, at_once: bool = False) -> None:
        """Write the file, unless that was just done."""
        now = time.monotonic()
        if now - self._last < self.config.every and not at_once:
            return
        self._last = now
        path = Path(self.config.file or trainer.session.directory.path / "heartbeat.json")
        aside = path.with_name(f".{path.name}.aside")
        content = {
            "step": trainer.global_step,
            "moment": moment,
            "time": time.time(),
            "pid": os.getpid(),
        }
        try:  # no fsync: who watches a file reads it through the same system
            aside.write_text(json.dumps(content) + "\n")
            aside.replace(path)
        except OSError as error:
            from loguru import logger

            logger.warning(f"the heartbeat {path} could not be written: {error}")
            self._last = now + 60  # a full disk is said once a minute

    def on_train_start(self, trainer: Trainer) -> None:
        """The first sign."""
        self.beat(trainer, "start", at_once=True)

    def on_step_end(self, trainer: Trainer) -> None:
        """A step is done."""
        self.beat(trainer, "step")

    def on_evaluate_batch_end(self, trainer: Trainer, batch: Any, loss: Any) -> None:
        """An evaluation goes on."""
        self.beat(trainer, "evaluation")

    def on_checkpoint_start(self, trainer: Trainer) -> None:
        """What follows may take long."""
        self.beat(trainer, "checkpoint", at_once=True)

    def on_checkpoint_end(self, trainer: Trainer, path: Path) -> None:
        """It is over."""
        self.beat(trainer, "step", at_once=True)

    def on_run_end(self, trainer: Trainer, result: Any) -> None:
        """The last sign."""
        self.beat(trainer, "end", at_once=True)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """The last sign of a run that failed."""
        self.beat(trainer, "error", at_once=True)


class WatchdogConfig(CallbackConfig):
    """`type: watchdog`."""

    type: str = "watchdog"

    timeout: Annotated[HumanFloat, Field(gt=0)] = 600.0
    """Seconds without a step after which every rank writes where it stands."""

    abort: bool = False
    """End the run then, with an error; without it the run may still go on."""


class Watchdog(Callback):
    """`type: watchdog`: where all threads of all ranks are when no step ends, in `logs/stacks-rank-N.txt`.

    A rank that hangs keeps all others waiting in a collective, so each watches itself. Not watched: all
    before the second step of this process (kernels are compiled), evaluations, tests, checkpoints and
    all after the last step.
    """

    name = "watchdog"
    config_type = WatchdogConfig
    config: WatchdogConfig

    def __init__(self, config: WatchdogConfig) -> None:
        super().__init__(config)
        self._seen: float | None = None
        """When there was a sign of life; None while nothing is watched."""
        self._where = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: TextIO | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Begin to look, from a thread."""
        folder = Path(trainer.config.logger.output_dir or trainer.session.directory.logs)
        rank = trainer.world.rank
        self._over.clear()
        self._thread = threading.Thread(
            target=self._watch, args=(folder / f"stacks-rank-{rank}.txt", rank), daemon=True,
            name="watchdog",
        )  # fmt: skip
        self._thread.start()

    def on_step_end(self, trainer: Trainer) -> None:
        """A step is done: the next one is waited for."""
        self._where = f"step {trainer.global_step}"
        self._seen = None if trainer.is_done else time.monotonic()

    def on_evaluate_start(self, trainer: Trainer) -> None:
        """Evaluations take as long as they take."""
        self._pause()

    def on_evaluate_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """Steps follow."""
        self._go_on(trainer)

    def on_checkpoint_start(self, trainer: Trainer) -> None:
        """Disks are slow."""
        self._pause()

    def on_checkpoint_end(self, trainer: Trainer, path: Path) -> None:
        """Steps follow."""
        self._go_on(trainer)

    def on_stop_requested(self, trainer: Trainer, reason: str) -> None:
        """No step follows."""
        self._pause()
        self._where = ""

    def on_train_end(self, trainer: Trainer) -> None:
        """No step follows."""
        self._end()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """The run is ending."""
        self._end()

    def _pause(self) -> None:
        self._seen = None

    def _go_on(self, trainer: Trainer) -> None:
        if self._where and not trainer.is_done:
            self._seen = time.monotonic()

    def _end(self) -> None:
        self._pause()
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, path: Path, rank: int) -> None:
        """What the thread does: arms a timer in C at each look, which also fires where a thread that hangs
        holds the interpreter's lock, so that this one cannot run."""
        timeout = self.config.timeout
        try:
            while not self._over.wait(timeout / 10):
                seen = self._seen
                if seen is None:
                    self._disarm()
                    continue
                if self._file is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = path.open("a")
                waited = time.monotonic() - seen
                if waited < timeout:
                    faulthandler.dump_traceback_later(timeout, file=self._file)
                    continue
                self._disarm()
                self._tell(path, rank, waited)
                self._seen = None  # once; the next step that ends watches again
        finally:
            self._disarm()
            if self._file is not None:
                self._file.close()
                self._file = None
                if not path.stat().st_size:
                    path.unlink()

    def _disarm(self) -> None:
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def _tell(self, path: Path, rank: int, waited: float) -> None:
        assert self._file is not None
        sentence = f"no step has ended for {waited:.0f} s on rank {rank}, after {self._where}"
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._file.flush()
        from loguru import logger

        logger.error(f"{sentence}; where all threads are stands in {path}")
        if self.config.abort:
            # what hangs may hang in C, where no exception reaches it
            sys.stderr.write(f"error: {sentence}: aborted by the watchdog; see {path}\n")
            sys.stderr.flush()
            report_exit(FAILED)
            os._exit(FAILED)
