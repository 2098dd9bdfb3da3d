"""`type: python`: rows that a function or a class of one's own gives."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from arctic_like.data.base import BadRow, DataSource, ReadRow, SourceConfig
from arctic_like.data.columns import kind
from arctic_like.data.splits import Stretch
from arctic_like.errors import Problem, RecipeError

_CODE = "arctic_code_"
"""How modules of a recipe's `code:` are named."""


class PythonSourceConfig(SourceConfig):
    """Rows of a function. `name_or_path` is its address; `kwargs` are its arguments."""

    splits_in_name: ClassVar[bool] = False

    type: str = "python"


class PythonSource(DataSource):
    """`type: python`: `name_or_path` is `module:function`, `file.py:function`, or the name of a
    function in the recipe's `code:`. Called with `kwargs`, and the recipe's `split` if it takes
    one, it gives rows; a class is called the same way and iterated."""

    name = "python"
    config_type = PythonSourceConfig
    config: PythonSourceConfig

    def problems(self) -> list[Problem]:
        """A file or a module that is not there."""
        try:
            home, _ = self._address()
        except RecipeError as error:
            return error.problems
        if home.endswith(".py"):
            missing = not Path(home).is_file()
        else:
            # the first part only: to look further would import it
            missing = bool(home) and importlib.util.find_spec(home.partition(".")[0]) is None
        if not missing:
            return []
        message = f"is {self.config.name_or_path!r}, and there is no module {home}"
        return [Problem(message, place="name_or_path", hint="check the name, or name a .py file")]

    def rows(self) -> Iterator[ReadRow]:
        part = Stretch.parse(self.config.split)
        total = sum(1 for _ in self._given()) if part.needs_total else 1 << 62
        wanted = part.rows(total)
        label = self._address()[1]
        for number, row in enumerate(self._given(), 1):
            if number > wanted.stop:
                return
            if number > wanted.start:
                place = f"{label}:{number}"
                expected = f"is {kind(row)}, not a map of columns"
                yield place, row if isinstance(row, dict) else BadRow(place, expected)

    def describe(self) -> str:
        """The function's name."""
        return self.config.name_or_path

    def _address(self) -> tuple[str, str]:
        """(module or file, name in it); no module for what the recipe's `code:` defines."""
        home, _, name = self.config.name_or_path.rpartition(":")
        if not name.isidentifier():
            raise RecipeError(
                Problem(f"is {self.config.name_or_path!r}, not the name of a function",
                        place="name_or_path", hint="write module:function, or file.py:function")
            )  # fmt: skip
        if home and not home.endswith(".py"):
            # a package beside the recipe looks like a path, which was made absolute
            home = Path(home).name
        return home, name

    def _given(self) -> Iterable[Any]:
        maker = self._maker()
        arguments = dict(self.config.kwargs)
        try:
            taken = inspect.signature(maker)
        except (TypeError, ValueError):
            taken = inspect.Signature()
        split = Stretch.parse(self.config.split).split
        if split and "split" in taken.parameters:
            arguments.setdefault("split", split)
        try:
            taken.bind(**arguments)
        except TypeError as error:
            raise RecipeError(
                Problem(f"does not fit {self.config.name_or_path}{taken}: {error}", place="kwargs")
            ) from None
        given = maker(**arguments)
        if not isinstance(given, Iterable):
            raise RecipeError(
                Problem(f"is {self.config.name_or_path!r}, which gives {kind(given)}, not rows",
                        place="name_or_path", hint="return a list of maps, or yield them")
            )  # fmt: skip
        return given

    def _maker(self) -> Callable[..., Any]:
        home, name = self._address()
        if home.endswith(".py"):
            modules = [_from_file(Path(home))]
        elif home:
            modules = [_imported(home)]
        else:
            modules = [m for key, m in sys.modules.items() if key.startswith(_CODE)]
        maker = next((getattr(m, name) for m in reversed(modules) if hasattr(m, name)), None)
        if not callable(maker):
            where = home or "the recipe's `code:`"
            raise RecipeError(
                Problem(f"is {self.config.name_or_path!r}, and {where} defines no function {name}",
                        place="name_or_path", hint="write module:function, or file.py:function")
            )  # fmt: skip
        found: Callable[..., Any] = maker
        return found


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecipeError(
            Problem(f"names the module {name!r}, which cannot be imported: {error}",
                    place="name_or_path", hint="install it, or name a .py file")
        ) from error  # fmt: skip


def _from_file(path: Path) -> Any:
    """The module of a file, under a name that no other file has; imported again where it changed."""
    import hashlib
    from types import ModuleType

    path = Path(os.path.expanduser(path)).resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            Problem(f"cannot be read: {error.strerror}", file=str(path), hint="check the path")
        ) from None
    name = f"arctic_rows_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    known = sys.modules.get(name)
    if known is not None and known.__dict__["__source__"] == source:
        return known
    module = ModuleType(name)
    module.__dict__.update(__source__=source, __file__=str(path))
    sys.modules[name] = module
    try:
        # compiled here, not by a loader: no __pycache__ is written beside the recipe
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
