"""A class joins its family when it is defined; a recipe finds it by `type:`.

    class Tracker(Part, family="tracker"): ...           # a family: built in, or a user's own

    class TensorBoard(Tracker):                          # a member
        name = "tensorboard"
        config_type = TensorBoardConfig

Built-in members are found through an index of names (`index.py`), so that only the modules of
the parts that a recipe names are imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

from arctic_like.config.base import PartConfig
from arctic_like.registry.dotted import is_dotted
from arctic_like.registry.index import BUILT_IN

_members: dict[str, dict[str, type[Part]]] = {}
_families: dict[str, type[Part]] = {}

P = TypeVar("P", bound="Part")


class Part:
    """Anything that a recipe can choose by `type:`."""

    family: ClassVar[str] = ""
    name: ClassVar[str] = ""
    config_type: ClassVar[type[PartConfig]] = PartConfig
    dotted: ClassVar[str] = ""
    """A family's base may name the member that stands for every class by its dotted path
    (`type: torch.optim.SGD`); empty: registered names only."""

    def __init_subclass__(cls, family: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family:
            cls.family = family
            _families[family] = cls
            _members.setdefault(family, {})
        elif "name" in cls.__dict__:
            from arctic_like.registry.factory_types import check_factory_types

            check_factory_types(cls)  # first: a class that is refused must not stay in its family
            register(cls)

    def __init__(self, config: Any) -> None:
        self.config = config


def register(cls: type[Part]) -> None:
    """Add a class to its family. Called when the class is defined; no need to call it.

    Raises TypeError where the class belongs to no family, its `config_type` is no PartConfig, or
    another
    class has the name. A class defined again (a notebook cell, a reloaded file) takes its own
    place.
    """
    if not cls.family:
        raise TypeError(
            f"{cls.__qualname__} has a name but no family; derive it from a family's base"
        )
    if not (isinstance(cls.name, str) and cls.name):
        raise TypeError(f"{cls.__qualname__}.name must be a text that a recipe can state")
    if not (isinstance(cls.config_type, type) and issubclass(cls.config_type, PartConfig)):
        raise TypeError(f"{cls.__qualname__}.config_type must be a PartConfig class")
    members = _members.setdefault(cls.family, {})
    home = f"{cls.__module__}:{cls.__qualname__}"
    other = members.get(cls.name)
    taken = f"{other.__module__}:{other.__qualname__}" if other else ""
    taken = taken or BUILT_IN.get(cls.family, {}).get(cls.name, "")
    if taken and taken != home:
        raise TypeError(
            f"{cls.family} {cls.name!r} is already {taken.replace(':', '.')}; "
            f"give {home.replace(':', '.')} another name"
        )
    members[cls.name] = cls


def forget(module: str) -> None:
    """Take out what a module registered that could not be imported to its end."""
    for members in _members.values():
        for name in [name for name, cls in members.items() if cls.__module__ == module]:
            del members[name]
    for family in [family for family, cls in _families.items() if cls.__module__ == module]:
        del _families[family], _members[family]


def names(family: str) -> list[str]:
    """All names that `type:` may have in a family, built in or registered so far."""
    return sorted({*BUILT_IN.get(family, {}), *_members.get(family, {})})


def families() -> list[str]:
    """All families: the built-in ones and those that user code has defined so far."""
    return sorted({*BUILT_IN, *_families})


def lookup(family: str, name: str) -> type[Part]:
    """The class registered under `name`; imports its module if it is built in.

    A dotted path (`torch.optim.SGD`) is the member that the family names for such paths. Where the
    name is not known, installed plug-ins are imported too. Raises KeyError if there is none;
    `Choice` and `recipe` turn it into a sentence with the nearest name.
    """
    members = _members.setdefault(family, {})
    if name not in members and name in BUILT_IN.get(family, {}):
        module, _, attribute = BUILT_IN[family][name].partition(":")
        if module not in sys.modules:
            importlib.import_module(module)
        members[name] = getattr(sys.modules[module], attribute)
    if name not in members:
        from arctic_like.registry.plugins import load_plugins

        load_plugins()
    if name not in members and is_dotted(name) and (stand_in := _dotted_member(family)):
        return lookup(family, stand_in)
    return members[name]


def _dotted_member(family: str) -> str:
    """The member that stands for dotted paths, which the family's base names; empty without one."""
    if family not in _families and family in BUILT_IN:  # a member's module imports the base
        lookup(family, next(iter(BUILT_IN[family])))
    return _families[family].dotted if family in _families else ""


def members(family: str) -> dict[str, type[Part]]:
    """Name → class for a whole family, plug-ins included; imports all their modules."""
    from arctic_like.registry.plugins import load_plugins

    load_plugins()
    return {name: lookup(family, name) for name in names(family)}


def summary(part: type[Part]) -> str:
    """The first sentence of a part's docstring, for lists and the schema; empty without one."""
    text = " ".join((part.__dict__.get("__doc__") or "").strip().split("\n\n")[0].split())
    text = re.sub(r"^`type: \w+`[:.,]?\s*", "", text)
    sentence = re.split(r"(?<=[^l]\.) (?=[A-Z`])", text)[0]
    return sentence[:1].upper() + sentence[1:]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, or empty where none is close."""
    import difflib  # 5 ms, for errors only

    lower = {entry.lower(): entry for entry in known}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return lower[found[0]] if found else ""


def unknown(family: str, name: str) -> str:
    """The way out where `lookup` finds nothing: the nearest name, and the known ones."""
    known = names(family)
    near = nearest(name, known)
    return (f"did you mean {near!r}? " if near else "") + f"known: {', '.join(known) or 'none'}"


def build(config: PartConfig, family: str) -> Any:
    """Make the part that a config describes (its `build` is called separately)."""
    return lookup(family, config.type)(config)
