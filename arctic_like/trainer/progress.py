"""Where a run stands, and what it came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Progress:
    """The counters of a run; all of them are in every checkpoint.

    position: samples seen since the run began; the whole state of the data order.
    """

    global_step: int = 0
    position: int = 0
    stopped: str = ""
    """Why the run stops before its horizon; empty while it does not."""
    finished: bool = False
    """The training came to its end and everything that follows it was done."""
    skipped: list[int] = field(default_factory=list)
    """Positions of global batches that are passed over (`trainer/rewind.py`)."""
    rewinds: dict[str, int] = field(default_factory=dict)
    """Checkpoint → how often the run went back to it."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Result:
    """What `Trainer.train` returns."""

    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    stop_reason: str
    """"finished", "interrupt", "terminate", "kill_switch", "exit_iteration" or what a callback said; in
    `result.json` also "non_finite" and "error"."""
    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of every metric."""
    best: dict[str, float] = field(default_factory=dict)
    """The lowest value of every loss and the highest of every other evaluation metric."""
    history: tuple[dict[str, float], ...] = ()
    """A record of each epoch: mean train loss, learning rate, evaluation values of its last step."""
    final_loss: float = float("inf")
    """What a search over runs ranks by: the monitored metric's last value, else the train loss;
    infinite where it was not finite."""
    checkpoint: Path | None = None
    """The newest complete checkpoint, if any."""
    exports: tuple[Path, ...] = ()
    """Folders that other libraries can load."""
    signal: int = 0
    """The signal that asked for the stop, or 0."""
    complete: bool = True
    """Whether the training came to its end: its last step, or a callback's conclusion (early stopping)."""
