"""`code:` in a recipe: the user's own file, imported under a stable module name."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path

from arctic_like import registry
from arctic_like.errors import Problem, RecipeError

DEFAULT = "train.py"
PREFIX = "arctic_code_"


def module_name(path: Path) -> str:
    """The module name of a file: the same in every process and for every resume."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    stem = "".join(c if c.isalnum() else "_" for c in path.stem)
    return f"{PREFIX}{stem}_{digest}"


def import_code(path: Path) -> None:
    """Import a user's file, so that its classes join their families.

    Once for each content: a file that changed since (in a notebook's session) is imported again.
    Its folder is put
    last on the import path, for modules beside it. Raises RecipeError with file and line of what
    fails in it.
    """
    path = path.resolve()
    name = module_name(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise RecipeError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__source__", None) == source:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(Problem("is no Python file", file=str(path), hint="name a .py file"))
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__source__"] = source
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        # compiled here, not by the loader: no __pycache__ is written beside the recipe
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        registry.forget(name)
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(_explain(error, path)) from error


def _explain(error: BaseException, path: Path) -> Problem:
    """The user's own frames only: ours and the import system's say nothing about the mistake."""
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = f"\n      {error.text.strip()}" if error.text else ""
        return Problem(
            f"{type(error).__name__}: {error.msg}{line}", file=str(path), line=error.lineno
        )
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path)]
    shown = [f"    line {frame.lineno}, in {frame.name}: {frame.line}" for frame in own[-3:]]
    line_number = own[0].lineno if own else None
    return Problem("\n".join([message, *shown]), file=str(path), line=line_number)
