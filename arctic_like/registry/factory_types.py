"""The `…_factory_type` attributes, by which a class says which parts it works with.

    class MyTrainer(Trainer):
        model_factory_type = (MyModelFactory, HFModelFactory)  # classes: the first is the default
        optimizer_factory_type = ("adamw", "fused_adam")       # or names, which import nothing

The attribute's first half is the family: `<family>_factory_type`, `<family>_engine_type` or
`<family>_type`, for a user's own family too. A family's base class stands for all its members and
gives no
default; an empty tuple says nothing about the family. Any part may state them about the parts
inside it.
"""

from __future__ import annotations

from typing import Any

from arctic_like import registry

_SUFFIXES = ("_factory_type", "_engine_type", "_type")


def stated(owner: type, family: str) -> tuple[str | type[registry.Part], ...]:
    """What `owner` lists for a family; empty where it says nothing."""
    for suffix in _SUFFIXES:
        listed = getattr(owner, family + suffix, None)
        if listed is not None:
            return _as_tuple(listed)
    return ()


def default_of(listed: tuple[str | type[registry.Part], ...]) -> str:
    """The `type:` that a recipe need not state; empty where the first is a family's base class."""
    if not listed:
        return ""
    first = listed[0]
    return first if isinstance(first, str) else first.name


def accepts(listed: tuple[str | type[registry.Part], ...], part: type[registry.Part]) -> bool:
    """Whether `part` is one of the listed classes or derived from one; an empty list accepts
    all."""
    if not listed:
        return True
    if part.name in listed:
        return True
    bases = (
        registry.lookup(part.family, entry) if isinstance(entry, str) else entry for entry in listed
    )
    return any(issubclass(part, base) for base in bases)


def names_of(listed: tuple[str | type[registry.Part], ...], family: str) -> list[str]:
    """The listed names, for a sentence; a family's base class stands for all."""
    found: list[str] = []
    for entry in listed:
        name = entry if isinstance(entry, str) else entry.name
        found += [name] if name else registry.names(family)
    return list(dict.fromkeys(found))


def check_factory_types(cls: type) -> None:
    """Check the attributes in a class's own body, when it is defined. Raises TypeError with a
    sentence."""
    known = set(registry.families())
    for attribute, listed in vars(cls).items():
        family = _family_of(attribute, known)
        if family is None:
            continue
        where = f"{cls.__qualname__}.{attribute}"
        if family not in known:
            near = registry.nearest(family, known)
            hint = f"; did you mean {near}{attribute[len(family) :]}?" if near else ""
            raise TypeError(f"{where}: there is no family {family!r}{hint}")
        for entry in _as_tuple(listed):
            _check_entry(where, entry, family)


def _check_entry(where: str, entry: Any, family: str) -> None:
    if isinstance(entry, str):
        if entry not in registry.names(family):
            near = registry.nearest(entry, registry.names(family))
            hint = f"; did you mean {near!r}?" if near else f"; known: {registry.names(family)}"
            raise TypeError(f"{where} names {entry!r}, which is no registered {family}{hint}")
        return
    if not (isinstance(entry, type) and issubclass(entry, registry.Part)):
        raise TypeError(
            f"{where} must be a class, the name of a part, or a tuple of these; it holds {entry!r}"
        )
    if entry.family != family:
        raise TypeError(
            f"{where} holds {entry.__qualname__}, which is a part of the family "
            f"{entry.family or '(none)'!r}, not of {family!r}"
        )


def _family_of(attribute: str, known: set[str]) -> str | None:
    """The family that an attribute is about; None where it is about something else."""
    if attribute in {"config_type"} or attribute.startswith("_"):
        return None
    for suffix in _SUFFIXES[:2]:
        if attribute.endswith(suffix):
            return attribute.removesuffix(suffix)
    prefix = attribute.removesuffix("_type")
    return prefix if prefix != attribute and prefix in known else None


def _as_tuple(listed: Any) -> tuple[Any, ...]:
    return tuple(listed) if isinstance(listed, tuple | list) else (listed,)
