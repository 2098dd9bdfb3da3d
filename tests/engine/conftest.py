"""One launch on two ranks for the tests of gradients and surgery."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.launch import GRADIENTS, SAVES, SURGERY, THRIFT, Found, probe


@pytest.fixture(scope="package")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="package")
def two_ranks(probes: Path) -> Found:
    return probe([*SAVES, *GRADIENTS, *SURGERY, *THRIFT], ranks=2, folder=probes)
