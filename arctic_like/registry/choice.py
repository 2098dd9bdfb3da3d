"""`Annotated[PartConfig, Choice("model")]`: a config whose class is named by the map's own `type:`.

Works in lists and optional fields, for built-in families and for a user's own:

    class DPOConfig(TrainerConfig):
        ref_model: Annotated[PartConfig, Choice("model")] = PartConfig()
        renderers: list[Annotated[PartConfig, Choice("renderer")]] = []

The default `type`, and which types go with it, are what the enclosing part says (the trainer, or
the data factory for its sources; see `factory_types`). Enclosing parts reach the validation
through its
context: `{"owners": (nearest, …, trainer)}`. A class that names no part of the family leaves
the field at `PartConfig()`, whose `type` is empty: no such part.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Union, get_args, get_origin

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from arctic_like import registry
from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.values import shown
from arctic_like.registry import factory_types
from arctic_like.registry.dotted import PATTERN

_described: ContextVar[tuple[tuple[str, ...], tuple[type, ...]]] = ContextVar(
    "_described", default=((), ())
)


class Choice:
    """Marks a field that holds the config of a part of `family`, chosen by `type:`.

    short: the key that a bare string stands for (`name_or_path` for a data source), if any.
    default: the `type` where no enclosing part gives one.
    """

    def __init__(self, family: str, *, short: str = "", default: str = "") -> None:
        self.family = family
        self.short = short
        self.default = default

    def expand(self, value: Any) -> Any:
        """The map that a bare string stands for; anything else as it is."""
        return {self.short: value} if self.short and isinstance(value, str) else value

    def config_class(
        self, name: str, owners: tuple[type, ...] = ()
    ) -> tuple[type[registry.Part] | None, type[PartConfig]]:
        """The part and the config class that `type: name` means below `owners`; (None,
        PartConfig) for none.

        Raises pydantic's custom error where the name is unknown or the part does not go with its
        owner.
        """
        owner, listed = self._listed(owners)
        name = name or factory_types.default_of(listed) or self.default
        if not name:
            return None, PartConfig
        part = self._find(name)
        if owner is not None and not factory_types.accepts(listed, part):
            raise wrong(_incompatible(part, owner, listed), place="type")
        return part, part.config_type

    def _listed(self, owners: tuple[type, ...]) -> tuple[type | None, tuple[Any, ...]]:
        for owner in owners:
            if listed := factory_types.stated(owner, self.family):
                return owner, listed
        return None, ()

    def _find(self, name: str) -> type[registry.Part]:
        try:
            return registry.lookup(self.family, name)
        except KeyError:
            hint = registry.unknown(self.family, name)
            raise wrong(
                f"is {name!r}, which is no {self.family}", place="type", hint=hint
            ) from None

    def validate(self, value: Any, info: core_schema.ValidationInfo) -> PartConfig:
        """Validate one map with the config class that its `type:` names."""
        context = info.context if isinstance(info.context, dict) else {}
        owners = tuple(context.get("owners", ()))
        if isinstance(value, PartConfig):
            self.config_class(value.type, owners)
            return value
        value = self.expand(value)
        if not isinstance(value, Mapping):
            raise wrong(f"is {shown(value)}, not a map with a `type:`")
        name = value.get("type", "")
        if not isinstance(name, str):
            raise wrong(f"is {shown(name)}, not a name", place="type")
        part, config = self.config_class(name, owners)
        if part is None:
            if not value:
                return PartConfig()
            known = ", ".join(registry.names(self.family))
            raise wrong("is needed", place="type", hint=f"one of: {known}")
        inner = {**context, "owners": (part, *owners)}
        return config.model_validate({**value, "type": name or part.name}, context=inner)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema: CoreSchema = core_schema.with_info_plain_validator_function(
            self.validate,
            # without this a field's declared base class would decide, and drop the subclass's keys
            serialization=core_schema.plain_serializer_function_ser_schema(
                _serialise, info_arg=True
            ),
        )
        if get_origin(source) in (Union, types.UnionType) and type(None) in get_args(source):
            return core_schema.nullable_schema(schema)
        return schema

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        families, owners = _described.get()
        if self.family in families:  # parts that hold parts of their own family
            variants: list[dict[str, Any]] = [{"type": "object"}]
        else:
            variants = list(self._variants(handler, families, owners))
        if self.short:
            variants.append({"type": "string"})
        if schema["type"] == "nullable":
            variants.append({"type": "null"})
        return {"anyOf": variants}

    def _variants(
        self, handler: GetJsonSchemaHandler, families: tuple[str, ...], owners: tuple[type, ...]
    ) -> Iterator[dict[str, Any]]:
        """One schema for each part that fits the owners; the default may leave `type` out."""
        _, listed = self._listed(owners)
        default = factory_types.default_of(listed) or self.default
        for name, part in registry.members(self.family).items():
            if not factory_types.accepts(listed, part):
                continue
            part.config_type.model_rebuild()  # it is built on first use, and this may be before
            # the handler skips the outermost schema's own hook (which adds the aliases): wrap it
            own = core_schema.no_info_after_validator_function(
                _same, part.config_type.__pydantic_core_schema__
            )
            with describing(part, *owners, families=(*families, self.family)):
                variant = dict(handler(own))
            properties = dict(variant.get("properties", {}))
            properties["type"] = {**_type_schema(part), "description": registry.summary(part)}
            # `required` without `type`: a base file or an override may state the others
            required = [] if name == default else ["type"]
            title = f"{self.family} {name}"
            yield {**variant, "properties": properties, "required": required, "title": title}


@contextmanager
def describing(*owners: type, families: tuple[str, ...] = ()) -> Iterator[None]:
    """While a JSON Schema is made: the enclosing parts, and the families around it."""
    token = _described.set((families, owners))
    try:
        yield
    finally:
        _described.reset(token)


def _type_schema(part: type[registry.Part]) -> dict[str, Any]:
    """What `type:` may say for a part: its name, or any dotted path where it stands for these."""
    if part.name == part.dotted:
        return {"type": "string", "pattern": PATTERN}
    return {"const": part.name}


def _same(value: Any) -> Any:
    return value


def _serialise(value: Any, info: core_schema.SerializationInfo) -> Any:
    if not isinstance(value, PartConfig):
        return value
    return value.model_dump(
        mode=info.mode, exclude_unset=info.exclude_unset, exclude_defaults=info.exclude_defaults
    )


def _incompatible(part: type[registry.Part], owner: type, listed: tuple[Any, ...]) -> str:
    owner_family, owner_name = getattr(owner, "family", ""), getattr(owner, "name", "")
    allowed = " or ".join(repr(name) for name in factory_types.names_of(listed, part.family))
    return (
        f"is {part.name!r} ({part.__qualname__}), which does not go with the {owner_family} "
        f"{owner_name!r} ({owner.__qualname__}); it takes {allowed}"
    )
