"""What keeps the commands quick to start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SWITCH = "PYDANTIC_DISABLE_PLUGINS"


@contextmanager
def without_pydantic_plugins() -> Iterator[None]:
    """Keep pydantic from looking for plug-ins, which reads the metadata of every installed package.

    That takes 80 ms of a `validate` of 400. Ended before a launch, so that the ranks have theirs.
    """
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "__all__"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SWITCH]
        else:
            os.environ[_SWITCH] = before


def process_began() -> float:
    """When this process was started, in seconds since 1970; now, where the system does not tell."""
    now = time.time()
    try:
        # fields behind the name, which may hold spaces; the 22nd of all is the start, in ticks since boot
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / os.sysconf(
            "SC_CLK_TCK"
        )
    except (OSError, ValueError, IndexError):
        return now
    return now - max(age, 0.0)
