"""The JSON Schema of recipes (draft 2020-12), from which editors complete and check."""

from __future__ import annotations

from typing import Any

from arctic_like import registry
from arctic_like.registry.choice import describing
from arctic_like.trainer.config import TrainerConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE = {"type": "string", "pattern": r"\$\{[^{}]+\}", "description": "A reference."}


def recipe_schema() -> dict[str, Any]:
    """One schema for all recipes: `type` decides which trainer's keys are known.

    Every value may be a reference (`${…}`), aliases are keys like their canonical ones, and nothing
    is required, as a base file or an override may state it.
    """
    trainers = registry.members("trainer")
    default = TrainerConfig.model_fields["type"].default
    branches: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for name, part in trainers.items():
        with describing(part):
            schema = part.config_type.model_json_schema()
        definitions |= schema.pop("$defs", {})
        schema["properties"] = _recipe_keys(schema["properties"], name, registry.summary(part))
        definitions[f"trainer_{name}"] = schema
        condition: dict[str, Any] = {"properties": {"type": {"const": name}}}
        if name != default:
            condition["required"] = ["type"]
        branches.append({"if": condition, "then": {"$ref": f"#/$defs/trainer_{name}"}})
    return {
        "$schema": DIALECT,
        "title": "arctic_like recipe",
        "type": "object",
        "properties": {"type": {"enum": list(trainers), "default": default}},
        "allOf": branches,
        "$defs": {name: relaxed(schema) for name, schema in definitions.items()},
    }


def _recipe_keys(properties: dict[str, Any], name: str, summary: str) -> dict[str, Any]:
    files = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return {
        **properties,
        "type": {"const": name, "description": summary},
        "extends": {**files, "description": "Base recipes, relative to this file; later ones win."},
    }


def relaxed(schema: Any) -> Any:
    """A schema in which every value may be a reference, and only a `type` is required."""
    if isinstance(schema, list):
        return [relaxed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in ("default", "const", "enum", "examples"):
            result[key] = value
        elif key == "required":
            result[key] = [name for name in value if name == "type"]
        elif key == "properties":
            result[key] = {name: _or_reference(relaxed(entry)) for name, entry in value.items()}
        elif key in ("additionalProperties", "items") and isinstance(value, dict):
            result[key] = _or_reference(relaxed(value))
        elif key == "prefixItems":
            result[key] = [_or_reference(relaxed(entry)) for entry in value]
        else:
            result[key] = relaxed(value)
    return result


def _or_reference(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, or a text that holds a reference; its own annotations stay outside, for editors."""
    if schema.get("type") == "string" and not {"pattern", "enum", "const"} & schema.keys():
        return schema
    if not schema.keys() - {"description", "title", "default"}:
        return schema  # anything goes
    outside: dict[str, Any] = {
        key: schema[key] for key in ("description", "default") if key in schema
    }
    inside = {key: value for key, value in schema.items() if key not in (*outside, "title")}
    if "const" in inside:
        return schema  # a `type:` tells the variants apart
    branches = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return {**outside, "anyOf": [*branches, _REFERENCE]}
