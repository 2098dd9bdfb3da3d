"""Families, names, and the index of built-in parts."""

import importlib
import pkgutil
import sys

import pytest

import arctic_like
from arctic_like import registry
from arctic_like.config.base import PartConfig
from arctic_like.registry.index import BUILT_IN


class Lamp(registry.Part, family="test_lamp"):
    pass


class LampConfig(PartConfig):
    watts: int = 5


class Bulb(Lamp):
    """Shines. And warms."""

    name = "bulb"
    config_type = LampConfig


def test_a_class_joins_its_family_when_it_is_defined():
    assert registry.lookup("test_lamp", "bulb") is Bulb
    assert "test_lamp" in registry.families()
    assert registry.names("test_lamp") == ["bulb"]
    assert registry.build(LampConfig(type="bulb", watts=7), "test_lamp").config.watts == 7


def test_summary_is_the_first_sentence():
    assert registry.summary(Bulb) == "Shines."
    assert registry.summary(Lamp) == ""


def test_a_name_is_taken_once():
    with pytest.raises(TypeError, match=r"already .*Bulb"):
        type("Other", (Lamp,), {"name": "bulb", "__module__": "elsewhere"})
    with pytest.raises(TypeError, match="already arctic_like"):
        type("MyAdam", (registry.lookup("optimizer", "adamw"),), {"name": "adamw"})


def test_a_class_defined_again_takes_its_own_place():
    again = type(
        "Bulb", (Lamp,), {"name": "bulb", "__module__": __name__, "config_type": LampConfig}
    )
    assert registry.lookup("test_lamp", "bulb") is again
    registry.register(Bulb)


def test_what_cannot_join():
    with pytest.raises(TypeError, match="no family"):
        type("Lost", (registry.Part,), {"name": "lost"})
    with pytest.raises(TypeError, match="PartConfig"):
        type("Odd", (Lamp,), {"name": "odd", "config_type": dict})
    with pytest.raises(TypeError, match="must be a text"):
        type("Odd", (Lamp,), {"name": ""})


def test_nearest():
    assert registry.nearest("fused_adm", ["fused_adam", "adamw"]) == "fused_adam"
    assert registry.nearest("Bulb", ["bulb"]) == "bulb"
    assert registry.nearest("qwertz", ["bulb"]) == ""


def test_the_index_is_complete_and_true():
    """Every named part class of the package stands in the index, where the index says."""
    for module in pkgutil.walk_packages(arctic_like.__path__, "arctic_like."):
        if module.name.startswith("arctic_like.cli") or module.name.endswith("__main__"):
            continue
        importlib.import_module(module.name)
    indexed = {
        (family, name, place) for family, parts in BUILT_IN.items() for name, place in parts.items()
    }
    found = {
        (family, name, f"{cls.__module__}:{cls.__qualname__}")
        for family in BUILT_IN
        for name, cls in registry._members[family].items()
        if cls.__module__.startswith("arctic_like.")
    }
    assert found == indexed
    assert len(found) > 15


def test_plugins_are_asked_when_a_name_is_unknown(monkeypatch, tmp_path):
    folder = tmp_path / "glow-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: glow\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[arctic_like.plugins]\nglow = glow_parts\n")
    (tmp_path / "glow_parts.py").write_text(
        "from arctic_like.registry import Part\n"
        "class Glow(Part, family='test_glow'): pass\n"
        "class Soft(Glow):\n    name = 'soft'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("arctic_like.registry.plugins._loaded", False)
    assert "glow_parts" not in sys.modules
    assert registry.lookup("test_glow", "soft").__name__ == "Soft"


def test_a_broken_plugin_is_named(monkeypatch, tmp_path):
    from arctic_like.errors import RecipeError

    folder = tmp_path / "dim-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: dim\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[arctic_like.plugins]\ndim = no_such_module_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("arctic_like.registry.plugins._loaded", False)
    with pytest.raises(RecipeError, match="package 'dim' cannot be imported"):
        registry.lookup("test_lamp", "nothing")
