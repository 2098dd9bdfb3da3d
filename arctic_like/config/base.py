"""The base of everything that a recipe can say: strict (no unknown key) and frozen."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError


def wrong(message: str, *, place: str = "", hint: str = "") -> PydanticCustomError:
    """The error that a validator raises: `raise wrong("is 3, more than 2", place="cut")`.

    `message` follows the place in a sentence, with value and rule; `place` is a dotted path below
    the
    map that is validated (empty: the value itself); `hint` is the way out.
    """
    # the text goes through the context: pydantic formats the template, and braces may stand in
    # the text
    context = {"message": message, "place": place, "hint": hint}
    return PydanticCustomError("wrong", "{message}", context)


class Config(BaseModel):
    """A map in a recipe. Unknown keys are errors; values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        arbitrary_types_allowed=False,
        protected_namespaces=(),
        # most classes are imported as bases or defaults and never validate: 10 ms each
        defer_build=True,
    )

    aliases: ClassVar[dict[str, str]] = {}
    """Other spellings of keys, old → canonical; replaced before anything is merged."""

    not_yet: ClassVar[dict[str, str]] = {}
    """Declared keys without an effect yet: key → what to use instead. Refused before the run."""

    no_effect: ClassVar[dict[str, str]] = {}
    """Keys that are accepted with a warning: key → why nothing is lost."""

    example: ClassVar[dict[str, Any]] = {}
    """What `arctic-train init` states for this map, beside the required keys."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A key of one's own is that key, whatever a class above calls by its name."""
        super().__pydantic_init_subclass__(**kwargs)
        if "aliases" not in cls.__dict__ and cls.aliases.keys() & cls.model_fields.keys():
            cls.aliases = {k: v for k, v in cls.aliases.items() if k not in cls.model_fields}

    @model_validator(mode="before")
    @classmethod
    def _canonical(cls, data: Any) -> Any:
        """Replace aliases; recipes come here canonical already, Python code need not."""
        if not isinstance(data, dict) or not cls.aliases.keys() & data.keys():
            return data
        result: dict[Any, Any] = {}
        spelled: dict[Any, Any] = {}
        for key, value in data.items():
            name = cls.aliases.get(key, key)
            other = name if name in data else spelled.get(name)
            if name != key and other is not None:
                raise wrong(f"and {other!r} are the same key", place=key, hint=f"keep {other!r}")
            result[name], spelled[name] = value, key
        return result

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Fields have their texts, aliases are keys too, and keys without an effect are marked."""
        from arctic_like.config.docs import attribute_docs

        result = handler(schema)
        body = handler.resolve_ref_schema(result)
        properties = body.get("properties", {})
        for key, text in attribute_docs(cls).items():
            if key in properties:
                properties[key] = {"description": text, **properties[key]}
        for key in cls.no_effect:
            properties[key] = {**properties[key], "deprecated": True}
        for alias, name in cls.aliases.items():
            described = {"description": f"Another spelling of `{name}`."}
            properties[alias] = {**properties[name], **described}
        return result


class PartConfig(Config):
    """The config of something chosen by `type:`; stands beside the class that it configures."""

    type: str = ""
    """The name of the part."""

    def given(self, key: str) -> bool:
        """Whether the recipe states `key`, as opposed to its default."""
        return key in self.model_fields_set

    def replace(self, **changes: Any) -> Any:
        """A copy with other values, validated; keeps what counts as given."""
        kept = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self).model_validate({**kept, **changes})
