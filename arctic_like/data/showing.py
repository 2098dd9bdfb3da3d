"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from arctic_like.logs import terminal

_EVERY_SECONDS = 10.0


class Shown(Protocol):
    """Where to say how far it is."""

    def update(self, rows: int, tokens: int) -> None:
        """Rows and tokens so far."""


@contextmanager
def progress_of(what: str, total: int | None = None) -> Iterator[Shown]:
    """Shows the progress of what is done within. total: about how many rows there are, if known.

    Only the process that does the work calls this, so none that waits says anything here.
    """
    console = terminal()
    if console is None:
        yield _Lines(what, total)
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(20),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn() if total is None else TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, said="")

        class OnTerminal:
            def update(self, rows: int, tokens: int) -> None:
                said = f"{rows:,} rows, {tokens:,} tokens"
                bar.update(task, completed=rows, said=said)

        yield OnTerminal()


class _Lines:
    def __init__(self, what: str, total: int | None) -> None:
        self._what = what
        self._total = total
        self._began = self._told = time.monotonic()
        self._before: int | None = None

    def update(self, rows: int, tokens: int) -> None:
        from loguru import logger

        if self._before is None:
            self._before = tokens
        now = time.monotonic()
        if now - self._told < _EVERY_SECONDS:
            return
        self._told = now
        rate = (tokens - self._before) / (now - self._began)
        share = f" ({min(rows / self._total, 1):.0%})" if self._total else ""
        logger.info(f"{self._what}: {rows:,} rows{share}, {tokens:,} tokens, {rate:,.0f} tokens/s")
