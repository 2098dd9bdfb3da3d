"""The JSON Schema of recipes (draft 2020-12), from which editors complete and check."""

from __future__ import annotations

from typing import Any

from arctic_like import registry
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
    """A schema in which every value may be a reference and no key is required."""
    if isinstance(schema, list):
        return [relaxed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: relaxed(value)
        for key, value in schema.items()
        if key not in ("required", "default", "properties", "examples", "const", "enum")
    }
    for key in ("default", "const", "enum", "examples"):
        if key in schema:
            result[key] = schema[key]
    if "properties" in schema:
        result["properties"] = {
            key: _or_reference(relaxed(value)) for key, value in schema["properties"].items()
        }
    if "additionalProperties" in schema and isinstance(schema["additionalProperties"], dict):
        result["additionalProperties"] = _or_reference(relaxed(schema["additionalProperties"]))
    if isinstance(schema.get("items"), dict):
        result["items"] = _or_reference(relaxed(schema["items"]))
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
    inside = {key: value for key, value in schema.items() if key not in outside}
    if "const" in inside:
        return schema  # a `type:` tells the variants apart
    branches = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return {**outside, "anyOf": [*branches, _REFERENCE]}
