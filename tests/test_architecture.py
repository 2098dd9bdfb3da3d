"""The floors of `docs/design.md`, enforced: imports point down, parts on one floor are strangers.

Everything is read from the source by `ast`; each test says how many modules it looked at, so that
green over a few files is not mistaken for green.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import arctic_like
from arctic_like import registry
from arctic_like.config.base import Config, PartConfig
from arctic_like.config.docs import attribute_docs
from arctic_like.registry.index import BUILT_IN

PACKAGE = Path(arctic_like.__file__).parent
ROOT = PACKAGE.parent

FLOORS: list[set[str]] = [
    {"errors", "loss", "world"},
    {"run_info", "stop", "logs", "rundir", "config", "kernels", "sequence"},
    {"registry"},
    {"tokenizer", "model", "data", "optimizer", "scheduler", "engine", "metrics", "tracking"}
    | {"generation", "methods"},
    {"checkpoint", "callbacks"},
    {"trainer"},
    {"recipe"},
    {"cli", "worker", "api", "inference", "planning", "__main__", "__init__"},
]
"""From the ground up. A room is a subpackage, or a module at the top of the package. Rooms of the
last floor, the doors, may know each other."""

EXCEPTIONS: dict[tuple[str, str], str] = {}
"""(module, module that it may import) → why, although the floors say no."""

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "wandb", "peft", "tensorboard", "rich"}
NUMERIC = {"numpy", "pyarrow", "pandas", "safetensors"}


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    module: str
    target: str
    line: int
    at_top: bool
    """Executed when the module is imported."""
    typing_only: bool


@cache
def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> tuple[Import, ...]:
    path = modules()[module]
    return tuple(_walk(module, ast.parse(path.read_text()), top=True, typing_only=False))


def _walk(module: str, node: ast.AST, *, top: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, child.lineno, top, typing_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: a relative import"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                target = full if full in modules() else str(child.module)
                yield Import(module, target, child.lineno, top, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(module, child, top=top, typing_only=True)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(module, child, top=top and not inside, typing_only=typing_only)


def room(module: str) -> str:
    """The subpackage or top-level module that a dotted name lies in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(name: str) -> int:
    return next((level for level, rooms in enumerate(FLOORS) if name in rooms), -1)


def test_every_module_stands_on_a_floor() -> None:
    homeless = sorted(name for name in modules() if floor(room(name)) < 0)
    assert homeless == []
    assert len(modules()) > 50


def test_imports_point_down_and_parts_on_one_floor_are_strangers() -> None:
    wrong, seen = [], 0
    for module in modules():
        seen += 1
        here = room(module)
        for imported in imports(module):
            target = imported.target
            if imported.typing_only or target.split(".")[0] != "arctic_like":
                continue
            there = room(target)
            if here == there or {here, there} <= FLOORS[-1]:
                continue
            if there == "__init__" or (module, target) in EXCEPTIONS:
                continue
            if floor(there) >= floor(here):
                wrong.append(f"{module}:{imported.line} imports {target}")
    assert seen == len(modules())
    assert wrong == []


def test_exceptions_are_still_needed() -> None:
    pairs = {(i.module, i.target) for module in modules() for i in imports(module)}
    assert set(EXCEPTIONS) <= pairs


def test_no_heavy_library_is_imported_at_the_top_of_a_module() -> None:
    wrong = [
        f"{module}:{i.line} imports {i.target}"
        for module in modules()
        for i in imports(module)
        if i.at_top and not i.typing_only and i.target.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_no_module_with_a_config_imports_numpy_at_its_top() -> None:
    homes = {path.rpartition(":")[0] for members in BUILT_IN.values() for path in members.values()}
    homes |= {f"arctic_like.{family}.base" for family in ("data", "model", "tokenizer")}
    wrong = [
        f"{module}:{i.line} imports {i.target}"
        for module in sorted(homes & set(modules()))
        for i in imports(module)
        if i.at_top and not i.typing_only and i.target.split(".")[0] in NUMERIC
    ]
    assert wrong == []


def test_importing_everything_that_a_recipe_can_name_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from arctic_like import registry, load_recipe\n"
        "found = [p for f in registry.families() for p in registry.members(f).values()]\n"
        "assert len(found) > 20, len(found)\n"
        f"print(*sorted({HEAVY | NUMERIC!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_libraries_have_one_home() -> None:
    homes = {
        "wandb": {"arctic_like.tracking.wandb"},
        "tensorboard": {"arctic_like.tracking.tensorboard"},
    }
    for library, allowed in homes.items():
        used = {
            module
            for module in modules()
            for i in imports(module)
            if i.target.split(".")[0] == library
        }
        assert used <= allowed, library
    rooms = {
        room(module)
        for module in modules()
        for i in imports(module)
        if i.target.split(".")[0] == "deepspeed" and not i.typing_only
    }
    # planning replaces parts of DeepSpeed that need a GPU or other ranks
    assert rooms <= {"engine", "optimizer", "model", "checkpoint", "inference", "planning"}


def defined_parts() -> dict[type[registry.Part], str]:
    """Every class of the package that has a name for recipes → module:class."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "arctic_like."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found: dict[type[registry.Part], str] = {}
    waiting = list(registry.Part.__subclasses__())
    while waiting:
        part = waiting.pop()
        waiting += part.__subclasses__()
        ours = part.__module__.startswith("arctic_like.")
        if ours and part.__dict__.get("name"):
            found[part] = f"{part.__module__}:{part.__qualname__}"
    return found


def test_the_index_of_names_is_complete_both_ways() -> None:
    defined = {(part.family, part.name): where for part, where in defined_parts().items()}
    indexed = {
        (family, name): where
        for family, members in BUILT_IN.items()
        for name, where in members.items()
    }
    assert indexed == defined
    assert len(indexed) > 20


@pytest.mark.parametrize("family", sorted(BUILT_IN))
def test_every_part_is_found_by_its_name_and_says_what_it_is(family: str) -> None:
    for name in BUILT_IN[family]:  # other tests of this process define parts of their own
        part = registry.lookup(family, name)
        assert part.name == name
        assert issubclass(part.config_type, PartConfig)
        assert registry.summary(part), f"{part.__qualname__} has no docstring"


def config_classes() -> list[type[Config]]:
    defined_parts()
    found, waiting = [], [Config]
    while waiting:
        config = waiting.pop()
        waiting += config.__subclasses__()
        if config.__module__.startswith("arctic_like."):
            found.append(config)
    return found


def test_every_key_of_a_recipe_is_documented() -> None:
    silent = [
        f"{config.__module__}.{config.__qualname__}.{name}"
        for config in config_classes()
        for name in config.model_fields
        if not attribute_docs(config).get(name)
    ]
    assert silent == []
    assert len(config_classes()) > 25


def test_keys_without_effect_are_declared_keys() -> None:
    for config in config_classes():
        known = set(config.model_fields)
        assert set(config.not_yet) | set(config.no_effect) <= known, config.__qualname__
        assert set(config.aliases.values()) <= known, config.__qualname__
        assert not set(config.aliases) & known, config.__qualname__


def test_public_names_are_exactly_what_can_be_imported() -> None:
    assert sorted(dir(arctic_like)) == sorted(arctic_like.__all__)
    for name in arctic_like.__all__:
        assert getattr(arctic_like, name) is not None
    with pytest.raises(AttributeError):
        _ = arctic_like.does_not_exist


def test_public_functions_and_classes_have_docstrings() -> None:
    silent, seen = [], 0
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        if path.stat().st_size and not ast.get_docstring(tree):
            silent.append(name)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                seen += 1
                if not ast.get_docstring(node) and not _is_overload(node):
                    silent.append(f"{name}.{node.name}")
    assert silent == []
    assert seen > 200


def _is_overload(node: ast.AST) -> bool:
    return any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", []))


def test_nothing_is_called_utils_and_nothing_prints() -> None:
    assert [name for name in modules() if "util" in name or "helper" in name] == []
    prints = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert prints == []


def test_parts_never_receive_the_trainer() -> None:
    families = set(BUILT_IN) - {"trainer", "callback", "checkpoint"}
    for family in sorted(families):
        for part in registry.members(family).values():
            build = getattr(part, "build", None)
            if build is not None:
                assert "trainer" not in inspect.signature(build).parameters, part
