"""TRL, which is in the extra `bench` alone and takes seconds to import."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl")
