"""Rehearses every change of the advice, alone and on top of those before it, and writes how each ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from arctic_like import load_recipe
from arctic_like.errors import RecipeError, RunError
from arctic_like.planning.advice import Change, changes
from arctic_like.planning.plan import Machine, make_plan
from arctic_like.planning.worst_case import worst_case


def outcomes(path: str, ranks: int) -> dict[str, dict[str, Any]]:
    """Overrides → {"planned": the plan}, {"refused": why it is no recipe} or {"failed": the error}."""
    config = load_recipe(path, []).config
    machine = Machine(ranks, on_gpu=True)
    prepared = worst_case(config, ranks=ranks)
    tried = [Change((), "")]
    together: Change | None = None
    for change in changes(config, machine):
        together = change if together is None else together + change
        tried += [change, together]
    found: dict[str, dict[str, Any]] = {}
    for words in dict.fromkeys(change.overrides for change in tried):
        try:
            plan = make_plan(load_recipe(path, list(words)), prepared, machine, knows_data=False)
            told = {"planned": plan.as_dict()}
        except RecipeError as refusal:
            told = {"refused": str(refusal)}
        except RunError as error:
            told = {"failed": str(error)}
        found[" ".join(words)] = told
    return found


def main() -> None:
    listing = Path(sys.argv[1])
    found = {
        name: outcomes(one["path"], one["ranks"])
        for name, one in json.loads(listing.read_text()).items()
    }
    listing.with_suffix(".tried").write_text(json.dumps(found))


main()
