"""Files of a checkpoint written by a thread of each rank while training goes on.

A rank's thread writes and syncs what the rank has captured and leaves a note of it beside the files. Rank
zero's waits for the notes of all, and publishes. So a checkpoint needs no word between ranks after the step
that saved it, and a run that ends with an error on all ranks still completes what was being written.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arctic_like.checkpoint.publish import files_below, seal
from arctic_like.engine.snapshot import step_back
from arctic_like.errors import CheckpointError

NOTES = ".sealed"
"""The folder of the notes, gone when the checkpoint is published."""
POLL_SECONDS = 0.05


class BackgroundSave:
    """One save of this rank under way.

    folder: where all ranks write. write: writes this rank's files and returns their names, relative to the
    folder. publish: rank zero's, called with what the marker says of all files.
    """

    def __init__(
        self, folder: Path, *, rank: int, ranks: int, write: Callable[[], list[str]],
        publish: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.error: BaseException | None = None
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._write, self._publish = write, publish
        self._mine_done, self._alone = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank's part is done, of rank zero: whether it is published; or it failed."""
        return not self._thread.is_alive()

    def join(self) -> BaseException | None:
        """Wait for the end of this rank's part; what went wrong in it."""
        self._thread.join()
        return self.error

    def give_up(self, *, after: float) -> None:
        """Wait for this rank's part, then at most `after` seconds for those of others, which may be gone."""
        self._mine_done.wait()
        self._thread.join(timeout=after)
        self._alone.set()

    def _run(self) -> None:
        step_back()
        note: dict[str, Any]
        try:
            note = {"files": seal(self._folder, self._write())}
        except BaseException as problem:
            self.error = problem
            note = {"error": str(problem)}
        try:
            self._leave(note)
            self._mine_done.set()
            if self._rank == 0 and self.error is None:
                self._conclude()
        except BaseException as problem:
            self.error = self.error or problem
        finally:
            self._mine_done.set()

    def _leave(self, note: dict[str, Any]) -> None:
        place = self._folder / NOTES / f"rank-{self._rank}.json"
        place.parent.mkdir(exist_ok=True)
        part = place.with_suffix(".part")
        part.write_text(json.dumps(note))
        part.rename(place)

    def _conclude(self) -> None:
        entries: dict[str, Any] = {}
        for rank in range(self._ranks):
            entries.update(self._note_of(rank))
        rest = [
            name
            for name in files_below(self._folder)
            if name not in entries and not name.startswith(NOTES)
        ]
        entries.update(seal(self._folder, rest))
        shutil.rmtree(self._folder / NOTES)
        self._publish(entries)

    def _note_of(self, rank: int) -> dict[str, Any]:
        place = self._folder / NOTES / f"rank-{rank}.json"
        while not place.exists():
            if self._alone.is_set():
                raise CheckpointError(f"rank {rank} ended before its part was written")
            time.sleep(POLL_SECONDS)
        note = json.loads(place.read_text())
        if "error" in note:
            raise CheckpointError(f"rank {rank} could not write its part: {note['error']}")
        files: dict[str, Any] = note["files"]
        return files
