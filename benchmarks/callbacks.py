"""What idle callbacks cost: the trainer's time per step with twenty of them and without, in one process.

    python benchmarks/callbacks.py               # or: --json out.json --limit 0.5

Each has every moment as an empty method of its own: what is left is the calling. Two numbers. The *ratio*
of steps in alternating blocks (with, without, with, …), as in overhead.py; at so small a cost it is noise
around zero. And the *calls* alone: the moments of a step, timed in a loop between steps. The
goal: under 0.5 % of a step of 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from overhead import Clocks, Setting, Times, compare, now, summary, write_recipe

STEP = (
    "on_step_start", "on_micro_batch_start", "on_micro_batch_end", "on_gradients_ready",
    "on_optimizer_step_start", "on_optimizer_step_end", "on_step_end", "on_log",
)  # fmt: skip
ROUNDS = 200


def idle_callbacks(count: int) -> list[Any]:
    """Callbacks that override all moments and brackets and do nothing."""
    from arctic_like.callbacks.base import MOMENTS, Callback, CallbackConfig

    nothing: dict[str, Any] = {moment: lambda self, *values: None for moment in MOMENTS}
    nothing |= {n: lambda self, trainer: None for n in ("around_step", "around_evaluate")}
    kind = type("Idle", (Callback,), {"name": "idle", "config_type": CallbackConfig, **nothing})
    return [kind(CallbackConfig()) for _ in range(count)]


def time_calls(trainer: Any, callbacks: Any) -> float:
    """Seconds that the moments of one step take with these callbacks."""
    arguments = {
        "on_micro_batch_start": (None,),
        "on_micro_batch_end": (None, None),
        "on_log": ({},),
    }
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for moment in STEP:
            callbacks.call(moment, trainer, *arguments.get(moment, ()))
        with callbacks.around("around_step", trainer):
            pass
    return (time.perf_counter() - begun) / ROUNDS


def attach(trainer: Any, setting: Setting, count: int, clocks: Clocks, calls: list[float]) -> None:
    """Let blocks of steps with the callbacks alternate with blocks without."""
    from arctic_like.callbacks.base import CallbackList

    without = CallbackList([], is_main=True)
    idle = CallbackList(idle_callbacks(count), is_main=True)
    mark, kind = now(), ""

    def between() -> None:
        nonlocal mark, kind
        if trainer.global_step % setting.steps_per_block:
            return
        if kind:
            clocks.add(kind, mark, setting.steps_per_block)
        if trainer.global_step % (20 * setting.steps_per_block) == 0:
            calls.append(time_calls(trainer, idle) - time_calls(trainer, without))
        kind = "bare" if kind == "trainer" else "trainer"
        trainer.equipment.callbacks = idle if kind == "trainer" else without
        mark = now()

    trainer.on_step_start = between


def measure(setting: Setting, count: int) -> tuple[Clocks, list[float]]:
    """Run the trainer; the times of blocks, and of calls alone."""
    import torch

    from arctic_like import load_recipe
    from arctic_like.api import execute
    from arctic_like.stop import StopRequest

    torch.set_num_threads(setting.threads)
    clocks, calls = Clocks(), [0.0][:0]
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(write_recipe(Path(name), setting), [])
        with contextlib.redirect_stdout(io.StringIO()):
            execute(
                recipe, output_dir=Path(name) / "run", resume="", stop=StopRequest(),
                inspect=lambda trainer: attach(trainer, setting, count, clocks, calls),
            )  # fmt: skip
    return Clocks(clocks.wall.warm(), clocks.cpu.warm()), calls


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--callbacks", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=400)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--limit", type=float, help="fail above so many percent (calls alone)")
    arguments = parser.parse_args()
    setting = Setting(
        blocks=arguments.blocks, steps_per_block=2, accumulation=1, length=72, hidden_size=128,
        zero_stage=2, dtype="fp32", threads=1,
    )  # fmt: skip
    clocks, calls = measure(setting, arguments.callbacks)
    step = statistics.median(clocks.cpu.bare)
    share = 100 * statistics.median(calls) / step
    for name, times in (("wall", clocks.wall), ("cpu", clocks.cpu)):
        one = compare(Times(times.trainer, times.bare))
        low, high = one["interval_95_percent"]
        print(
            f"{name:5}  without {one['bare_step_ms']:.1f} ms, with {arguments.callbacks} callbacks "
            f"{one['trainer_step_ms']:.1f} ms: {one['overhead_percent']:+.2f} % "
            f"(95 %: {low:+.2f} to {high:+.2f}; {one['pairs_of_blocks']} pairs of blocks)"
        )
    print(
        f"calls  {1e6 * statistics.median(calls):.0f} µs a step, {share:.3f} % of {1000 * step:.1f} ms, "
        f"{100 * statistics.median(calls) / 0.05:.3f} % of 50 ms"
    )
    if arguments.json:
        content = {**summary(clocks, setting), "calls_us": [1e6 * call for call in calls]}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(arguments.limit is not None and share > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
