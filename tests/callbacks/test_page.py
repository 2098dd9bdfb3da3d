"""docs/callbacks.md: every callback is in the table, and every example is a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from arctic_like.registry import lookup
from arctic_like.registry.index import BUILT_IN

PAGE = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| .+ \| `(\{.+\})` \|$", PAGE, re.M)


def test_the_table_has_every_callback_with_a_valid_example() -> None:
    assert {name for name, _ in ROWS} == set(BUILT_IN["callback"])
    for name, example in ROWS:
        content = yaml.safe_load(example)
        assert content["type"] == name
        lookup("callback", name).config_type.model_validate(content)
