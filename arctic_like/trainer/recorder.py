"""Where a run's numbers go: `metrics.jsonl`, the record of truth, and the trackers (rank zero)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arctic_like.registry import build

if TYPE_CHECKING:
    from arctic_like.run_info import RunInfo
    from arctic_like.trainer.assembly import Session


class Recorder:
    """Writes lines; a null object on all other ranks."""

    def __init__(self, session: Session, config: Any, info: RunInfo) -> None:
        self._session = session
        self._config = config
        self._info = info
        self._file: Any = None
        self._copy: Any = None
        self.trackers: list[Any] = []
        if session.world.is_main:
            self._open()

    def _open(self) -> None:
        from arctic_like.tracking.base import Guarded
        from arctic_like.tracking.metrics_file import MetricsFile

        self._file = MetricsFile(self._session.directory.path / "metrics.jsonl")
        if self._config.train_log_metrics_path:
            self._copy = MetricsFile(self._config.train_log_metrics_path)
        configs = tracker_configs(self._config)
        self.trackers = [Guarded(build(config, "tracker")) for config in configs]

    def start(self, *, saved: dict[str, Any] | None) -> None:
        """Begin, or go on behind the lines that a checkpoint knows of.

        saved: the checkpoint's `metrics` entry; None for a new run, which starts an empty file.
        """
        if self._file is None:
            return
        self.rewind(saved or {"offset": 0, "step": -1})
        states = saved["trackers"] if saved else {}
        for tracker in self.trackers:
            tracker.start(
                run_name=self._session.directory.path.name,
                recipe=dict(self._session.recipe.resolved),  # environment references unexpanded
                output_dir=self._session.directory.path,
                total_steps=self._info.training_horizon,
                state=states.get(tracker.name, {}),
            )

    def rewind(self, saved: dict[str, Any]) -> None:
        """Take back the lines behind those that a checkpoint knows of; trackers keep what they have.

        saved: the checkpoint's `metrics` entry.
        """
        for file in filter(None, (self._file, self._copy)):
            file.rewind(saved["offset"] if file is self._file else None, saved["step"])

    def write(self, line: dict[str, Any], *, kind: str) -> None:
        """One line. `kind`: "train", "evaluation", "epoch", "values"."""
        if self._file is None:
            return
        for file in filter(None, (self._file, self._copy)):
            file.write(line)
        step, values = line["step"], {k: v for k, v in line.items() if k != "step"}
        for tracker in self.trackers:
            if tracker.name != "console" or kind != "train" or self._shown(step):
                tracker.scalars(step, values)

    def _shown(self, step: int) -> bool:
        """Whether the console shows this step's loss (`loss_log_interval`)."""
        total = self._info.training_horizon
        interval = self._config.loss_log_interval
        if interval.unit == "seconds":
            return True
        return step == total or bool(
            interval.due(step, steps_per_epoch=self._info.steps_per_epoch, total_steps=total)
        )

    def sync(self, step: int) -> dict[str, Any]:
        """Bring all lines to the disk; what a checkpoint must know to go on behind them."""
        if self._file is None:
            return {}
        return {
            "offset": self._file.sync(),
            "step": step,
            "trackers": {tracker.name: tracker.state() for tracker in self.trackers},
        }

    def finish(self, exit_code: int) -> None:
        """Close file and trackers."""
        for tracker in self.trackers:
            tracker.finish(exit_code)
        for file in filter(None, (self._file, self._copy)):
            file.close()


def tracker_configs(config: Any) -> list[Any]:
    """The recipe's trackers, the console first, and `wandb:` as the tracker that it is short for."""
    from arctic_like.registry import lookup

    configs = list(config.trackers)
    if not any(tracker.type == "console" for tracker in configs):
        configs.insert(0, lookup("tracker", "console").config_type(type="console"))
    if config.wandb.enable:
        short = config.wandb.model_dump(exclude={"enable"})
        configs.append(lookup("tracker", "wandb").config_type(type="wandb", **short))
    return configs
