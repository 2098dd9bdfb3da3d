"""Rehearses recipes as on a GPU, an evaluation included, and writes how each ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from arctic_like import load_recipe
from arctic_like.cli.preparation import prepare
from arctic_like.errors import ArcticError
from arctic_like.planning import rehearsal
from arctic_like.planning.course import course_of
from arctic_like.planning.rehearsal import Prepared, rehearse
from arctic_like.trainer.base import Trainer
from arctic_like.trainer.classification import ClassificationTrainer

capture = rehearsal._capture


def evaluated(trainer: Any, memory: Any) -> None:
    """Behind the last step."""
    capture(trainer, memory)
    trainer.evaluate()


def outcome(path: str) -> str:
    """ "" or the error."""
    recipe = load_recipe(path, [])
    done = prepare(recipe, level="WARNING")
    prepared = Prepared(done.tokenizer, done.data)
    micro_batches = course_of(recipe.config, prepared, ranks=1).micro_batches
    try:
        rehearse(recipe, prepared, ranks=1, on_gpu=True, micro_batches=micro_batches)
    except ArcticError as error:
        return str(error)
    return ""


def main() -> None:
    listing = Path(sys.argv[1])
    with (
        patch.object(rehearsal, "_capture", evaluated),
        patch.object(Trainer, "log", lambda *_, **__: None),
        # torchmetrics copies tensors in a way that those without memory do not know
        patch.object(ClassificationTrainer, "get_val_metrics", lambda _: {}),
    ):
        found = {name: outcome(path) for name, path in json.loads(listing.read_text()).items()}
    listing.with_suffix(".ended").write_text(json.dumps(found))


main()
