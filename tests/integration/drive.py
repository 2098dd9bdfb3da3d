"""Runs a list of recipes on this rank, one after another; leaves what tests compare beside each run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.engine.weights import iterate_weights
from arctic_like.stop import StopRequest


def weights_digest(module: Any) -> str:
    """One digest of all full weights (collective)."""
    digest = hashlib.sha256()
    for name, tensor in iterate_weights(module):
        if tensor is not None:
            digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    listing = Path(sys.argv[1])
    is_main = os.environ.get("RANK", "0") == "0"
    for job in json.loads(listing.read_text()):
        facts: dict[str, Any] = {}

        def inspect(trainer: Any, facts: dict[str, Any] = facts) -> None:
            facts["initial"] = weights_digest(trainer.module)
            seen: list[list[int]] = []
            step, teardown = trainer.step, trainer.teardown

            def watched(micro_batches: Any) -> None:
                seen.append([i for m in micro_batches if m.scale for i in m.samples])
                step(micro_batches)

            def last(*arguments: Any) -> None:
                facts["final"] = weights_digest(trainer.module)
                ranks = trainer.session.host.gather(seen)
                facts["samples"] = [
                    sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)
                ]
                teardown(*arguments)

            trainer.step, trainer.teardown = watched, last

        result = execute(
            load_recipe(job["recipe"], job.get("overrides", [])),
            output_dir=Path(job["output_dir"]), resume=job.get("resume", ""), stop=StopRequest(),
            inspect=inspect,
        )  # fmt: skip
        if is_main:
            facts |= {"stop_reason": result.stop_reason, "steps": result.steps}
            (Path(job["output_dir"]) / "facts.json").write_text(json.dumps(facts))
    if is_main:
        listing.with_suffix(".done").write_text("")


main()
# as the worker of a command ends: gloo's threads and the interpreter's end do not wait for each other
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
