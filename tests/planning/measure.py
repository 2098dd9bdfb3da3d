"""Trains recipes on this rank and writes what each allocated, as torch's own CPU allocator reports it.

The peak counts from when the model is there: what it holds then, and every allocation and release after. The
record begins before there is a model: torch's allocator reports no release of what it did not see allocated.
Reference cycles are collected before each micro-batch and each update: when Python does it by itself is
chance. So is when gloo's thread lets go of a collective's tensors: of 300 `all_reduce` on a busy machine 291
were released after the last reference in Python was gone, up to 51 ms after, and none with a pause of 5 ms
behind each. The memory that an asynchronous checkpoint copies into is asked for by a thread of its own, of
which torch keeps no record: here the first save asks for it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function

from arctic_like import load_recipe
from arctic_like.api import execute
from arctic_like.engine.deepspeed import Engine
from arctic_like.engine.snapshot import HostArena
from arctic_like.stop import StopRequest

wait = Work.wait
RELEASE_SECONDS = 0.005
START = "the model is there"


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's weights and buffers, each storage once."""
    held = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
    held += [p.ds_tensor.untyped_storage() for p in module.parameters() if hasattr(p, "ds_tensor")]
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def waited(work: Work, *arguments: Any) -> bool:
    """Wait for a collective, and for gloo's thread to let go of its tensors: it does so some time after."""
    done = wait(work, *arguments)
    time.sleep(RELEASE_SECONDS)
    return done


def measured(recipe_path: str, output_dir: Path) -> dict[str, int]:
    """Peak in bytes on this rank, and the optimizer steps that were done."""
    record = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    recipe = load_recipe(recipe_path, [])
    held: list[int] = []
    engine_made = Engine.__init__

    def make(engine: Engine, module: torch.nn.Module, **arguments: Any) -> None:
        if not held:
            gc.collect()
            held.append(size_of(module))
            with record_function(START):
                pass
        engine_made(engine, module, **arguments)

    class Watched(recipe.trainer):  # type: ignore[misc, name-defined]
        def on_micro_batch_start(self, batch: Any) -> None:
            super().on_micro_batch_start(batch)
            gc.collect()

        def on_optimizer_step_start(self) -> None:
            super().on_optimizer_step_start()
            gc.collect()

    object.__setattr__(recipe, "trainer", Watched)
    gc.collect()
    record.start()
    with (
        patch.object(Engine, "__init__", make),
        patch.object(Work, "wait", waited),
        patch.object(HostArena, "prepare", lambda *_: None),
    ):
        result = execute(recipe, output_dir=output_dir, resume="", stop=StopRequest())
    record.stop()
    live = peak = held[0]
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    began = next(event.start_ns() for event in events if event.name() == START)
    for event in sorted(events, key=lambda event: event.start_ns()):  # threads come one by one
        if event.name() == "[memory]" and event.start_ns() > began:
            live += event.nbytes()
            peak = max(peak, live)
    return {"peak": peak, "steps": result.steps}


def main() -> None:
    listing = Path(sys.argv[1])
    rank = os.environ.get("RANK", "0")
    found: dict[str, Any] = {}
    for name, path in json.loads(listing.read_text()).items():
        found[name] = measured(path, listing.parent / f"runs-{listing.stem}" / name)
    listing.with_suffix(f".measured-{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
