"""What is said, and where: the console of the chosen ranks, and `logs/rank-N.log` with everything.

All output of a run goes through one rich console on standard output, so that a message does not
tear the progress display. The standard library's `logging` and `warnings`, which torch, deepspeed
and transformers use, come through loguru too; what libraries say below WARNING is for the files.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

Ranks = Literal["*"] | Collection[int]

LIBRARIES = ("DeepSpeed", "transformers", "datasets", "huggingface_hub", "accelerate", "torch")
"""Loggers that put handlers of their own on the console, at import or later."""

_FILE_FORMAT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <8} {name}:{function}:{line} {message}"
_console: Console | None = None
_sinks: list[int] = []
_said_from: str | None = None
"""The least severe level that this rank says on the console; None where it says nothing."""
_undo: list[Callable[[], None]] = []


def console() -> Console:
    """The one console of this process. A pipe gets plain text, 80 columns wide."""
    global _console
    if _console is None:
        from rich.console import Console

        live = sys.stdout.isatty()
        _console = Console(
            force_terminal=live, force_jupyter=False, width=None if live else 80, highlight=False
        )
    return _console


def terminal() -> Console | None:
    """The console for a display that moves: if it is a terminal, and this rank says INFO on it."""
    live = _said_from is not None and _severity(_said_from) <= logging.INFO
    return console() if live and sys.stdout.isatty() else None


def setup_logging(
    *,
    rank: int = 0,
    level: str = "INFO",
    output_dir: Path | None = None,
    print_output_ranks: Ranks = (0,),
    file_output_ranks: Ranks = "*",
) -> None:
    """Say where this rank's messages go. May be called again; the last call counts.

    level: the least severe messages on the console. output_dir: folder of `rank-N.log`, made at the
    first message; None for no file. Ranks: a list, or "*" for all.
    """
    from loguru import logger

    global _console, _said_from
    close_logging()
    _console = None
    with contextlib.suppress(ValueError):
        logger.remove(0)  # loguru's own; others belong to the user's process
    if _among(rank, print_output_ranks):
        _said_from = level
        _sinks.append(
            logger.add(_print, level=level, format=_console_format(rank), filter=_for_console,
                       backtrace=False, diagnose=False)
        )  # fmt: skip
    if output_dir is not None and _among(rank, file_output_ranks):
        _sinks.append(
            logger.add(
                output_dir / f"rank-{rank}.log", level=min(level, "DEBUG", key=_severity),
                format=_FILE_FORMAT, delay=True, encoding="utf-8", backtrace=False, diagnose=False,
            )
        )  # fmt: skip
    _take_over_logging()
    _take_over_warnings()


def close_logging() -> None:
    """Give `logging` and `warnings` back and close our sinks. Does nothing if none are open."""
    from loguru import logger

    global _said_from
    _said_from = None
    while _undo:
        _undo.pop()()
    while _sinks:
        logger.remove(_sinks.pop())


def _among(rank: int, ranks: Ranks) -> bool:
    return ranks == "*" or rank in ranks


def _severity(level: str) -> int:
    from loguru import logger

    return logger.level(level).no


def _console_format(rank: int) -> Callable[[Any], str]:
    """INFO speaks for itself; other levels, and other ranks, are named."""
    origin = f"[rank {rank}] " if rank else ""

    def template(record: Any) -> str:
        level = record["level"].name
        name = "" if level in ("INFO", "SUCCESS") else f"{level.lower()}: "
        return origin + name + "{message}\n{exception}"

    return template


def _for_console(record: Any) -> bool:
    return not record["extra"].get("library") or record["level"].no >= logging.WARNING


def _print(message: Any) -> None:
    """Put one message above the progress display, if there is one. Long lines are not broken."""
    from rich.text import Text

    number = message.record["level"].no
    style = "red" if number >= logging.ERROR else "yellow" if number >= logging.WARNING else ""
    console().print(Text(str(message).rstrip("\n"), style=style), soft_wrap=True)


class _ToLoguru(logging.Handler):
    """Hands a record of the standard library to loguru, with its place in the code."""

    def emit(self, record: logging.LogRecord) -> None:
        from loguru import logger

        try:
            level: str | int = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno

        def place(there: Any) -> None:
            there.update(name=record.name, function=record.funcName, line=record.lineno)

        library = record.name.partition(".")[0] in LIBRARIES or _is_library(record.pathname)
        logger.bind(library=library).patch(place).opt(exception=record.exc_info).log(
            level, "{}", record.getMessage()
        )


class _Captured(logging.Logger):
    """A library's logger that keeps no handler of its own and always passes on to the root.

    A logger that exists already becomes one (`__class__`), so it also holds for handlers that the
    library adds later: at import (DeepSpeed) or at its first message (transformers).
    """

    def addHandler(self, hdlr: logging.Handler) -> None:
        """Ignored: the root's handler is enough."""

    @property
    def propagate(self) -> bool:
        """Always true."""
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None:
        pass


def _take_over_logging() -> None:
    root, handler = logging.getLogger(), _ToLoguru()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)

    def give_back() -> None:
        root.removeHandler(handler)
        root.setLevel(level)

    _undo.append(give_back)
    for name in LIBRARIES:
        _capture(logging.getLogger(name))


def _capture(library: logging.Logger) -> None:
    before, handlers = library.__class__, list(library.handlers)
    library.handlers.clear()
    library.__class__ = _Captured

    def give_back() -> None:
        library.__class__ = before
        library.handlers[:] = handlers

    _undo.append(give_back)


def _take_over_warnings() -> None:
    before = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: Any = None, line: str | None = None,
    ) -> None:  # fmt: skip
        from loguru import logger

        # Said to developers, about a later version: for the file.
        later = issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))

        def place(there: Any) -> None:
            there.update(name=filename, function=category.__name__, line=lineno)

        said = logger.bind(library=_is_library(filename)).patch(place)
        said.log("DEBUG" if later else "WARNING", "{}", message)

    warnings.showwarning = show

    def give_back() -> None:
        warnings.showwarning = before

    _undo.append(give_back)


def _is_library(path: str) -> bool:
    """Whether code lies among installed packages, as opposed to the user's own."""
    return "site-packages" in path or "dist-packages" in path
