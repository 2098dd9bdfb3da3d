"""Write `docs/recipe.md`: every key of a recipe, from the config classes themselves.

    python docs/generate_reference.py          # or: make docs

A test fails where the page is not what this writes.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from arctic_like import registry
from arctic_like.config.base import Config
from arctic_like.config.delta import Delta
from arctic_like.config.docs import attribute_docs, describe
from arctic_like.config.interval import Interval
from arctic_like.registry.choice import Choice
from arctic_like.trainer.config import TrainerConfig

PAGE = Path(__file__).with_name("recipe.md")

HEAD = """# What a recipe can say

This page is written by `make docs` from the classes that validate a recipe. `arctic-train schema`
prints the same as JSON Schema for editors, and `arctic-train init TRAINER` as a commented recipe.

A recipe is a YAML map. Unknown and duplicate keys are errors, with the line and the nearest key.

- **Numbers** may be written as people do: `1e-5`, `10^6`, `4Ki`, `1.25M`, `5%`.
- **Intervals** are steps (`100`), epochs (`1 epoch`), a part of the run (`5%`) or time (`10 min`);
  0 is off.
- **Parts** are maps with a `type:`, which decides their other keys.
- **Paths** that are relative belong to the folder of the file that states them.
- `extends: base.yaml` (or a list) takes other recipes as a base: maps merge, lists replace.
- `${data.max_length}` is another key's value, `${HOME}` an environment variable.
- On the command line, `optimizer.lr=1e-5 data.sources.0.split=train` override the file.
- A file of Python beside the recipe (`code:`) brings trainers and parts of your own.
"""

DEEPSPEED = """## deepspeed

DeepSpeed's own settings, as in its documentation; every key and type is checked. The recipe's batch
sizes, accumulation and dtype are filled in, and a section that contradicts them is refused.
`"auto"` is accepted where transformers accepts it. `optimizer` and `scheduler` are parts of the
recipe and not of this section.

What is not DeepSpeed's default, unless you give it:

| key | value | why |
|---|---|---|
| `zero_optimization.stage` | 2 | as in ArcticTraining |
| `gradient_clipping` | 1.0 | 0 is off |
| `data_types.grad_accum_dtype` | fp32 | bf16, fp16 at stages 1–3: to add up micro-batches |
| `communication_data_type` | fp32 | bf16, fp16 at stages 1–3: to add up ranks |
| `zero_optimization.reduce_bucket_size` | width², at least 2^20 | from the model |
| `zero_optimization.stage3_prefetch_bucket_size` | 0.9 width², at least 2^20 | at stage 3 |
| `zero_optimization.stage3_param_persistence_threshold` | 10 width | at stage 3 |
| `timers.throughput.enabled` | false | it would wait for the device twice a micro-batch |

`zero_optimization.offload_optimizer: {device: cpu}` needs stage 1 or higher, `offload_param` needs
stage 3, and fp16 needs a GPU.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD, "## The top level\n", *table(TrainerConfig), DEEPSPEED]
    for family in sorted(registry.BUILT_IN, key=order):
        sections += part_sections(family)
    return "\n".join(sections).rstrip() + "\n"


def order(family: str) -> int:
    """Families in the order of a recipe's keys."""
    keys = ["trainer", "model", "tokenizer", "data", "source", "optimizer", "scheduler"]
    return keys.index(family) if family in keys else len(keys)


def part_sections(family: str) -> Iterator[str]:
    """A family's heading with the keys that its parts share, and a section for each part."""
    yield f"## {family}\n"
    members = registry.members(family)
    base = base_config(next(iter(members.values())))
    shared = list(table(base)) if family != "trainer" and len(members) > 1 else []
    if shared:
        yield f"Every {family} has these keys:\n"
        yield from shared
    for name, part in members.items():
        yield f"### {family}: `{name}`\n"
        text = first_paragraph(part, name) or first_paragraph(part.config_type)
        yield from [f"{text}\n"] if text else []
        yield from table(part.config_type, without=base if shared or family == "trainer" else None)


def base_config(part: type[registry.Part]) -> type[Config]:
    """The config class of a part's family."""
    home = next(c for c in reversed(part.__mro__) if getattr(c, "family", "") == part.family)
    config: type[Config] = home.config_type  # type: ignore[attr-defined]
    return config


def table(config: type[Config], *, without: type[Config] | None = None) -> Iterator[str]:
    """The keys of a config class, then those of the maps inside it."""
    for described in (config, without or config):
        describe(described)
    texts, known = attribute_docs(config), attribute_docs(without) if without else {}
    fields = {
        name: field
        for name, field in config.model_fields.items()
        if name != "type"
        and not (
            without and texts[name] == known.get(name)
            and default(field) == default(without.model_fields[name])
        )
    }  # fmt: skip
    if not fields:
        return
    others: dict[str, list[str]] = {}
    for spelling, new in config.aliases.items():
        others.setdefault(new, []).append(f"`{spelling}`")
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    inner: dict[str, type[Config]] = {}
    for name, field in fields.items():
        also = f" (also {', '.join(others[name])})" if name in others else ""
        text = " ".join(texts[name].split()) + remark(config, name)
        value = kind(field.annotation, field.metadata, inner)
        rows.append(f"| `{name}`{also} | {value} | {default(field)} | {text} |")
    yield "\n".join(rows) + "\n"
    for name, below in inner.items():
        yield f"#### {name}\n\n{first_paragraph(below)}\n"
        yield from table(below)


def remark(config: type[Config], name: str) -> str:
    """What becomes of a key that has no effect (yet)."""
    if name in config.not_yet:
        return f" **Not yet**: a run that sets it is refused; {config.not_yet[name]}."
    if name in config.no_effect:
        return f" **No effect**: {config.no_effect[name]}."
    return ""


def kind(annotation: Any, metadata: Any, inner: dict[str, type[Config]]) -> str:
    """A type in words; nested configs are noted in `inner`."""
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = (*more, *metadata)
    choice = next((mark for mark in metadata if isinstance(mark, Choice)), None)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if choice is not None:
        article = "an" if choice.family[0] in "aeiou" else "a"
        return f"{article} [{choice.family}](#{choice.family})"
    if origin in (Union, types.UnionType):
        members = [kind(a, (), inner) for a in arguments if a is not type(None)]
        return " or ".join(dict.fromkeys(members)) + (" or null" if type(None) in arguments else "")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, set, frozenset):
        return f"list of {kind(arguments[0], (), inner).removeprefix('a ').removeprefix('an ')}"
    if origin is tuple:
        return "list of " + ", ".join(kind(a, (), inner) for a in arguments if a is not Ellipsis)
    if origin is dict or annotation is dict:
        values = kind(arguments[1], (), inner) if arguments[1:] else "any"
        return "map" if values == "any" else f"map of {values}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        inner[annotation.__name__] = annotation
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    words = {
        int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path",
        Interval: "interval", Delta: "difference", Any: "any", type(None): "null",
    }  # fmt: skip
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default(field: FieldInfo) -> str:
    """A field's default as it would stand in a recipe."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ({}, [], "") or isinstance(value, Config):
        return (
            "" if value is None or isinstance(value, Config) else f"`{value!r}`".replace("''", '""')
        )
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def first_paragraph(thing: type, name: str = "") -> str:
    """The first paragraph of a docstring in one line, without the name that the heading has."""
    paragraphs = inspect.cleandoc(thing.__doc__ or "").split("\n\n")
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    if lines[0].rstrip(".") == f"`type: {name}`":
        lines = lines[1:] or [""]
    text = lines[0].removeprefix(f"`type: {name}`: ").removeprefix(f"`type: {name}`. ")
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page())
