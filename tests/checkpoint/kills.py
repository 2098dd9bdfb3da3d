"""A process that dies at its n-th change of the file system: from there on no further change happens."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
}


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


class _Death:
    def __init__(self) -> None:
        self.folder = ""
        self.left: int | None = None
        self.count = 0

    def hook(self, event: str, values: tuple[Any, ...]) -> None:
        """Called by Python before every file operation; raising here means that it does not happen."""
        if self.left is None or not self._changes(event, values):
            return
        self.count += 1
        self.left -= 1
        if self.left < 0:
            if self.left == -1 and event == "open":
                self._tear(values[0])
            raise Killed

    def _changes(self, event: str, values: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode = values[0], values[1]
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            return bool(writes) and str(path).startswith(self.folder)
        return event in _CHANGES

    def _tear(self, path: str) -> None:
        """A file that was being written when the process died is there and empty."""
        left, self.left = self.left, None
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        self.left = left


_death = _Death()
_installed: list[bool] = []


@contextlib.contextmanager
def killed_after(changes: int | None, folder: Path) -> Iterator[_Death]:
    """Inside, only so many changes happen, then `Killed` is raised; None: all of them, counted."""
    if not _installed:
        sys.addaudithook(_death.hook)  # for good; idle outside this context
        _installed.append(True)
    _death.folder, _death.count = str(folder), 0
    _death.left = sys.maxsize if changes is None else changes
    try:
        yield _death
    finally:
        _death.left = None
