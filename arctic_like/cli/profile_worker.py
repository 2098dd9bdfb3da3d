"""What each process of `arctic-train profile` runs: the recipe's steps, timed, then traced."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from arctic_like.callbacks.base import Callback, CallbackConfig, CallbackList
from arctic_like.cli.profile import REQUEST, WARM_UP
from arctic_like.cli.profile_page import write_page
from arctic_like.errors import DONE
from arctic_like.metrics.bottleneck import Operation, idle_share
from arctic_like.stop import StopRequest
from arctic_like.worker import exit_code, run_as_rank

_EXCHANGES = ("nccl", "gloo::", "c10d::")
"""Kernels and operators of exchanges, which have a phase."""


def main() -> int:
    """Profile on this rank; returns its exit code."""
    from arctic_like.api import execute, recipe_from_environment

    def work() -> int:
        recipe, folder, _ = recipe_from_environment()
        request = json.loads((folder / REQUEST).read_text())
        stop = StopRequest.from_environment()
        execute(recipe, output_dir=folder, resume="", stop=stop,
                inspect=lambda trainer: attach(trainer, request))  # fmt: skip
        return 128 + stop.requested() if stop.requested() else DONE

    return exit_code(work)


def attach(trainer: Any, request: dict[str, Any]) -> None:
    """Let a set-up trainer be measured when it trains."""
    measure = Measure(CallbackConfig(type="profile_steps"), request)
    equipment = trainer.equipment
    equipment.callbacks = CallbackList(
        [*equipment.callbacks.all, measure], is_main=trainer.world.is_main
    )
    if trainer.world.size > 1:
        trainer.measure_communication()


class Measure(Callback):
    """Times steps after the warm-up, traces the steps after those, and writes what came of it. No recipe
    names it."""

    def __init__(self, config: Any, request: dict[str, Any]) -> None:
        super().__init__(config)
        # in notes of errors; as an attribute of the class it would be one that recipes may name
        self.name = "profile_steps"  # type: ignore[misc]
        self._steps, self._recipe = int(request["steps"]), str(request["recipe"])
        self._done = 0
        self._phases: dict[str, float] = {}
        self._profiler: Any = None

    def on_step_end(self, trainer: Any) -> None:
        """Begin and end the measurements."""
        self._done += 1
        if self._done == WARM_UP:
            _wait(trainer)
            trainer.phases.start()
        elif self._done == WARM_UP + self._steps:
            _wait(trainer)
            found = trainer.phases.read(self._steps)
            self._phases = {name.removeprefix("time/"): value for name, value in found.items()}
            self._begin(trainer)
        elif self._done == WARM_UP + 2 * self._steps:
            self._end(trainer)

    def _begin(self, trainer: Any) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if trainer.device != "cpu" else []
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _end(self, trainer: Any) -> None:
        """Write the trace and, on rank zero, the page. Collective."""
        _wait(trainer)
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        folder: Path = trainer.session.directory.path
        profiler.export_chrome_trace(str(folder / f"trace-rank-{trainer.world.rank}.json.gz"))
        on_cpu = trainer.device == "cpu"
        size = trainer.world.size
        names = sorted(self._phases)
        sums = trainer.sum_over_ranks([self._phases[name] for name in names])
        if trainer.world.is_main:
            write_page(
                folder, recipe=self._recipe, device=_device(trainer), ranks=size,
                steps=self._steps, phases=dict(zip(names, (s / size for s in sums), strict=True)),
                operations=operations_of(profiler, steps=self._steps, on_cpu=on_cpu),
                idle=None if on_cpu else device_idle(profiler), memory=_memory(trainer),
            )  # fmt: skip

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        """Close the profiler."""
        if self._profiler is not None:
            with contextlib.suppress(Exception):
                self._profiler.stop()


def operations_of(profiler: Any, *, steps: int, on_cpu: bool) -> list[Operation]:
    """Operators (CPU) or kernels (CUDA) by their own time, the longest first; without exchanges."""
    found = []
    for event in profiler.key_averages():
        micros = event.self_cpu_time_total if on_cpu else event.self_device_time_total
        is_kernel = str(event.device_type).endswith("CUDA")
        wanted = event.key.startswith("aten::") if on_cpu else is_kernel
        if micros > 0 and wanted and not any(word in event.key.lower() for word in _EXCHANGES):
            found.append(Operation(event.key, micros / 1e6 / steps, event.count / steps))
    return sorted(found, key=lambda one: -one.seconds)


def device_idle(profiler: Any) -> float | None:
    """The share of the traced time in which no kernel ran; None where none was seen."""
    events = list(profiler.events())
    kernels = [(e.time_range.start, e.time_range.end) for e in events
               if str(e.device_type).endswith("CUDA")]  # fmt: skip
    if not kernels:
        return None
    return idle_share(
        kernels, begin=min(begin for begin, _ in kernels), end=max(end for _, end in kernels)
    )


def _wait(trainer: Any) -> None:
    if trainer.device != "cpu":
        import torch

        torch.cuda.synchronize()


def _device(trainer: Any) -> str:
    if trainer.device == "cpu":
        import torch

        return f"cpu, {torch.get_num_threads()} threads a rank"
    import torch

    return str(torch.cuda.get_device_name(trainer.device))


def _memory(trainer: Any) -> dict[str, float]:
    """Of this rank's device: most bytes in use and held, and how often it was full and had to give back."""
    if trainer.device == "cpu":
        return {}
    import torch

    stats = torch.cuda.memory_stats()
    return {
        "peak_bytes": float(stats["allocated_bytes.all.peak"]),
        "reserved_bytes": float(stats["reserved_bytes.all.peak"]),
        "retries": float(stats["num_alloc_retries"]),
    }


if __name__ == "__main__":
    run_as_rank(main)
