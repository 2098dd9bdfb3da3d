"""Plans recipes and writes what each is said to take."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from arctic_like import load_recipe
from arctic_like.cli.preparation import prepare
from arctic_like.planning.plan import Machine, make_plan
from arctic_like.planning.rehearsal import Prepared


def main() -> None:
    listing, ranks = Path(sys.argv[1]), int(sys.argv[2])
    found = {}
    for name, path in json.loads(listing.read_text()).items():
        recipe = load_recipe(path, [])
        done = prepare(recipe, level="WARNING")
        plan = make_plan(recipe, Prepared(done.tokenizer, done.data), Machine(ranks))
        found[name] = plan.as_dict()
    listing.with_suffix(".planned").write_text(json.dumps(found))


main()
