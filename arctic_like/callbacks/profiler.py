"""Where the time goes (torch's profiler) and where the memory goes (CUDA's history of allocations)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanInt, RecipePath

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

Ranks = Literal["*"] | list[HumanInt]


class ProfilerConfig(CallbackConfig):
    """`type: profiler`."""

    type: str = "profiler"

    wait: HumanInt = Field(default=1, ge=0)
    """Steps at the beginning of each cycle that are not looked at."""

    warmup: HumanInt = Field(default=1, ge=0)
    """Steps that are recorded and thrown away: the profiler itself is slow at first."""

    active: HumanInt = Field(default=3, ge=1)
    """Steps that are recorded."""

    repeat: HumanInt = Field(default=1, ge=0)
    """Cycles of wait, warmup and active; 0 goes on to the end."""

    skip_first: HumanInt = Field(default=0, ge=0)
    """Steps before the first cycle."""

    ranks: Ranks = [0]
    """Ranks that record: a list, or `*` for all."""

    record_shapes: bool = False
    """Note the shapes of operators' inputs."""

    profile_memory: bool = False
    """Note allocations."""

    with_stack: bool = False
    """Note where in the code operators were called (slow)."""

    rows: HumanInt = Field(default=15, ge=0)
    """Rows of the table in the log; 0 writes none."""

    output_dir: RecipePath | None = None
    """Folder of the traces; `profile/` in the run directory unless given."""


class Profiler(Callback):
    """`type: profiler`: traces of some steps (`rank-0-step-5.json.gz`, for chrome://tracing or Perfetto) and
    the operators that took longest in the log. Steps are counted in this process, from 1.
    """

    name = "profiler"
    config_type = ProfilerConfig
    config: ProfilerConfig

    def __init__(self, config: ProfilerConfig) -> None:
        super().__init__(config)
        self._profiler: Any = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Open the profiler."""
        if self.config.ranks != "*" and trainer.world.rank not in self.config.ranks:
            return
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        config = self.config
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profiler = profile(
            activities=activities, record_shapes=config.record_shapes,
            profile_memory=config.profile_memory, with_stack=config.with_stack,
            schedule=schedule(wait=config.wait, warmup=config.warmup, active=config.active,
                              repeat=config.repeat, skip_first=config.skip_first),
            on_trace_ready=lambda profiler: self._ready(trainer, profiler),
        )  # fmt: skip
        self._profiler.start()

    def around_step(self, trainer: Trainer) -> contextlib.AbstractContextManager[None] | None:
        """A step with its name in the trace; its end moves the schedule."""
        return None if self._profiler is None else self._step(trainer)

    @contextlib.contextmanager
    def _step(self, trainer: Trainer) -> Iterator[None]:
        from torch.profiler import record_function

        with record_function(f"train step {trainer.global_step + 1}"):
            yield
        self._profiler.step()

    def on_train_end(self, trainer: Trainer) -> None:
        """Close it; what an unfinished cycle recorded is written."""
        self._stop()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Close it."""
        with contextlib.suppress(Exception):
            self._stop()

    def _stop(self) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()

    def _ready(self, trainer: Trainer, profiler: Any) -> None:
        from loguru import logger

        folder = Path(self.config.output_dir or trainer.session.directory.path / "profile")
        folder.mkdir(parents=True, exist_ok=True)
        # inside the step that closes a cycle: it is not counted yet
        path = folder / f"rank-{trainer.world.rank}-step-{trainer.global_step + 1}.json.gz"
        profiler.export_chrome_trace(str(path))
        if self.config.rows:
            key = "self_cpu_time_total" if trainer.device == "cpu" else "self_device_time_total"
            rows = profiler.key_averages().table(sort_by=key, row_limit=self.config.rows)
            logger.info("{}", f"profile of {self.config.active} steps, the trace is {path}\n{rows}")


class CUDAMemoryConfig(CallbackConfig):
    """`type: cuda_memory`."""

    type: str = "cuda_memory"

    mode: Literal["step", "e2e"] = "step"
    """`step`: a snapshot after each of `steps` steps, of that step alone. `e2e`: one snapshot of the whole
    run, from the setup on."""

    steps: HumanInt = Field(default=3, ge=1)
    """How many steps of this process `step` records."""

    max_entries: HumanInt = Field(default=100_000, ge=1)
    """Most entries that the history keeps; older ones are dropped."""

    output_dir: RecipePath | None = None
    """Folder of the snapshots; `mem-prof/` in the logs' folder unless given."""


class CUDAMemory(Callback):
    """`type: cuda_memory`: every rank's allocations with their stacks (`rank-0-step-1.pickle`), to be looked
    at on pytorch.org/memory_viz. One more is written where the run ends with an error, out of memory above
    all. Does nothing on a CPU, and says so.
    """

    name = "cuda_memory"
    config_type = CUDAMemoryConfig
    config: CUDAMemoryConfig

    def __init__(self, config: CUDAMemoryConfig) -> None:
        super().__init__(config)
        self._recording = False
        self._left = config.steps

    def on_setup_start(self, trainer: Trainer) -> None:
        """`e2e` begins here."""
        if trainer.device == "cpu":
            from loguru import logger

            if trainer.world.is_main:
                logger.warning("cuda_memory has nothing to record: this run is on a CPU")
        elif self.config.mode == "e2e":
            self._record()

    def on_step_start(self, trainer: Trainer) -> None:
        """`step` begins a history."""
        if trainer.device != "cpu" and self.config.mode == "step" and self._left:
            self._record()

    def on_step_end(self, trainer: Trainer) -> None:
        """`step` ends it."""
        if self._recording and self.config.mode == "step":
            self._left -= 1
            self._dump(trainer, f"step-{trainer.global_step}")

    def on_train_end(self, trainer: Trainer) -> None:
        """`e2e` ends here."""
        if self._recording:
            self._dump(trainer, "end")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """What led to the error."""
        if self._recording:
            self._dump(trainer, "error")

    def _record(self) -> None:
        import torch

        torch.cuda.memory._record_memory_history(max_entries=self.config.max_entries)
        self._recording = True

    def _dump(self, trainer: Trainer, what: str) -> None:
        import torch
        from loguru import logger

        logs = trainer.config.logger.output_dir or trainer.session.directory.logs
        folder = Path(self.config.output_dir or Path(logs) / "mem-prof")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{trainer.world.rank}-{what}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = False
        logger.info(f"memory snapshot: {path}")
