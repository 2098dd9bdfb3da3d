import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tests.recipe import workshop  # noqa: F401


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write("a.yaml", text)` in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
