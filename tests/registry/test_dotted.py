"""Classes by dotted path: what is a path, what is imported when, and what an error says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import ValidationError

from arctic_like import registry
from arctic_like.config.base import Config, PartConfig
from arctic_like.errors import RecipeError
from arctic_like.registry.choice import Choice
from arctic_like.registry.dotted import (
    check_arguments,
    import_class,
    is_dotted,
    parameters,
    with_numbers,
)


class Taking:
    """A class with one needed argument."""

    class Inner:
        """Found by one more dot."""

    def __init__(self, first: Any, needed: int, *, other: float = 1.0) -> None: ...


class Anything:
    def __init__(self, first: Any, **kwargs: Any) -> None: ...


HERE = Taking.__module__


def test_the_grammar() -> None:
    for path in ("torch.optim.SGD", "a.b", "_a._b1"):
        assert is_dotted(path), path
    for text in ("adamw", "", "a.", ".a", "a..b", "1.b", "a.b c", "a-b.c"):
        assert not is_dotted(text), text


def test_classes_are_found_in_modules_and_in_classes() -> None:
    assert import_class(f"{HERE}.Taking", place="x") is Taking
    assert import_class(f"{HERE}.Taking.Inner", place="x") is Taking.Inner
    assert import_class("collections.OrderedDict", place="x").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no_such_package.Thing", "no module 'no_such_package'"),
        ("collections.OrderedDic", "did you mean collections.OrderedDict"),
        ("collections.nothing.Here", "has no 'nothing'"),
        ("math.sin", "not a class"),
    ],
)
def test_what_is_not_there(path: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence) as caught:
        import_class(path, place="optimizer.type")
    assert caught.value.problems[0].place == "optimizer.type"


def test_a_module_that_fails_keeps_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_by_import.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        import_class("broken_by_import.Thing", place="x")


def test_arguments() -> None:
    assert list(parameters(Taking)) == ["first", "needed", "other"]
    check_arguments(Taking, ["needed"], place="x", ours=["first"])
    check_arguments(Anything, ["whatever"], place="x", ours=["first"])
    with pytest.raises(RecipeError) as caught:
        check_arguments(Taking, ["othr", "first"], place="x", ours=["first"])
    places = {problem.place: str(problem) for problem in caught.value.problems}
    assert set(places) == {"x.othr", "x.first", "x.needed"}
    assert "did you mean 'other'" in places["x.othr"]
    assert "is needed" in places["x.needed"]


def test_human_numbers() -> None:
    stated = {"a": "1e-3", "b": ["5%", "4Ki", "min"], "c": {"d": "10^2"}, "e": True, "f": 2}
    assert with_numbers(stated) == {
        "a": 0.001, "b": [0.05, 4096, "min"], "c": {"d": 100}, "e": True, "f": 2,
    }  # fmt: skip


class Tool(registry.Part, family="test_tool"):
    dotted: ClassVar[str] = "any.Tool"


class AnyToolConfig(PartConfig):
    type: str = "any.Tool"
    size: int = 1


class AnyTool(Tool):
    """Whatever has dots."""

    name = "any.Tool"
    config_type = AnyToolConfig


class Hammer(Tool):
    """A hammer."""

    name = "hammer"


class Shed(Config):
    tool: Annotated[PartConfig, Choice("test_tool")] = PartConfig()


def test_a_family_of_a_users_own_may_take_dotted_paths() -> None:
    shed = Shed.model_validate({"tool": {"type": "shop.tools.Saw", "size": 3}})
    assert isinstance(shed.tool, AnyToolConfig)
    assert shed.tool.type == "shop.tools.Saw"  # kept: the part imports it
    assert type(registry.build(shed.tool, "test_tool")) is AnyTool
    assert type(registry.build(PartConfig(type="hammer"), "test_tool")) is Hammer
    with pytest.raises(ValidationError, match="which is no test_tool"):
        Shed.model_validate({"tool": {"type": "saw"}})


def test_a_family_without_them_refuses_them() -> None:
    with pytest.raises(KeyError):
        registry.lookup("checkpoint", "torch.optim.SGD")


def test_the_schema_takes_a_name_or_a_path() -> None:
    variants = Shed.model_json_schema()["properties"]["tool"]["anyOf"]
    kinds = {entry["title"]: entry["properties"]["type"] for entry in variants}
    assert kinds["test_tool hammer"]["const"] == "hammer"
    assert kinds["test_tool any.Tool"]["pattern"].startswith("^")


def test_validating_a_dotted_path_imports_nothing() -> None:
    code = (
        "import sys\n"
        "from arctic_like.registry.choice import Choice\n"
        "for family, path in (('optimizer', 'torch.optim.SGD'),\n"
        "                     ('scheduler', 'torch.optim.lr_scheduler.StepLR')):\n"
        "    part, config = Choice(family).config_class(path)\n"
        "    config.model_validate({'type': path, 'anything': 1})\n"
        "    assert part.name == 'module.Class', part\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
