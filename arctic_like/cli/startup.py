"""What keeps the commands quick to start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
