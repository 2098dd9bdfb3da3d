"""docs/data.md: each row on it is read as its section says, each recipe validates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from arctic_like import load_recipe
from arctic_like.data import shapes
from arctic_like.data.base import Shape, SourceConfig
from arctic_like.data.files import COMPRESSED
from arctic_like.data.presets import PRESETS
from arctic_like.data.readers import READERS
from arctic_like.errors import RecipeError

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", PAGE, re.S | re.M))
ROWS = [
    (shape, json.loads(line))
    for shape, text in SECTIONS.items()
    for line in re.findall(r"^    (\{.*\})$", text, re.M)
]
READ = {
    "text": lambda row, config: shapes.text(row, config),
    "preference": shapes.pair,
    "unpaired": shapes.unpaired,
    "tokenised": lambda row, config: shapes.tokens(row),
}


def test_every_shape_has_its_section_and_rows() -> None:
    known = set(get_args(Shape)) - {"auto"}
    assert known <= SECTIONS.keys()
    assert {shape for shape, _ in ROWS} == known
    assert len(ROWS) >= 12


@pytest.mark.parametrize(("shape", "row"), ROWS)
def test_a_row_is_read_as_its_section_says(shape: str, row: dict[str, Any]) -> None:
    read: Any = READ.get(shape, shapes.conversation)
    found = read(row, SourceConfig())
    assert found == read(row, SourceConfig.model_validate({"shape": shape}))
    shapes.tools(row)
    if read is shapes.conversation:
        assert found[-1]["role"] == "assistant"
        last = next(m for m in reversed(found) if m["role"] != "assistant")
        assert last["role"] in ("user", "tool")


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.S | re.M))
def test_recipes_on_the_page_validate(block: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {name_or_path: none}\n" + block)
    try:
        load_recipe(tmp_path / "recipe.yaml")
    except RecipeError as error:
        pytest.fail(str(error))


def test_formats_and_names_are_complete() -> None:
    for suffix in (*READERS, *COMPRESSED):
        assert re.search(rf"[| `,.]{re.escape(suffix.lstrip('.'))}[ ,`|]", PAGE), suffix
    for name in PRESETS:
        assert f"`{name}`" in PAGE
