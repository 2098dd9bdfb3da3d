"""The moments of a run as empty methods of the Trainer; `callbacks/base.py` draws their order."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arctic_like.errors import NonFiniteError
    from arctic_like.trainer.progress import Result


class Moments:
    """What a Trainer subclass may override; called before the callbacks' methods of the same name."""

    def on_run_start(self) -> None:
        """Before anything is built."""

    def on_setup_start(self) -> None:
        """Before the first part is built."""

    def on_part_start(self, part: str) -> None:
        """Before a part is built; `part` is its key in the recipe."""

    def on_part_end(self, part: str) -> None:
        """After a part was built."""

    def on_setup_end(self) -> None:
        """Everything is built and, when resuming, loaded."""

    def on_train_start(self) -> None:
        """Before the first evaluation and step of this process."""

    def on_epoch_start(self) -> None:
        """Before the first step of an epoch (or of its rest, when resuming)."""

    def on_step_start(self) -> None:
        """The global batch and its weight are known; `global_step` counts the steps done so far."""

    def on_micro_batch_start(self, batch: Any) -> None:
        """Before the forward of a micro-batch, which is on the device."""

    def on_micro_batch_end(self, batch: Any, loss: Any) -> None:
        """After its backward; `loss` is the `Loss`, its mean detached from nothing yet freed."""

    def on_gradients_ready(self) -> None:
        """All micro-batches are through; gradients are neither clipped nor applied."""

    def on_optimizer_step_start(self) -> None:
        """Directly before the update."""

    def on_optimizer_step_end(self) -> None:
        """Directly after the update, before the scheduler moves."""

    def on_step_end(self) -> None:
        """`global_step` counts the step that just ended."""

    def on_log(self, values: dict[str, Any]) -> None:
        """A train line is about to be written (rank zero has the values that count)."""

    def on_epoch_end(self) -> None:
        """The epoch's last step is done; its evaluation and checkpoint follow."""

    def on_evaluate_start(self) -> None:
        """The model is in eval mode; random generators are put back afterwards."""

    def on_evaluate_batch_start(self, batch: Any) -> None:
        """Before an evaluation micro-batch."""

    def on_evaluate_batch_end(self, batch: Any, loss: Any) -> None:
        """After an evaluation micro-batch."""

    def on_evaluate_end(self, results: dict[str, float]) -> None:
        """All sets are through; values added to `results` join the evaluation line."""

    def on_checkpoint_start(self) -> None:
        """Before a checkpoint is written."""

    def on_checkpoint_end(self, path: Path) -> None:
        """A checkpoint is complete and visible at `path`."""

    def on_checkpoint_loaded(self, path: Path) -> None:
        """The run continues from `path`."""

    def on_stop_requested(self, reason: str) -> None:
        """All ranks agreed to stop."""

    def on_interrupt(self) -> None:
        """The stop was asked by a signal."""

    def on_exception(self, error: BaseException) -> None:
        """The run is ending with an error on this rank."""

    def on_weights_loaded(self, path: Path) -> None:
        """The main model's weights were replaced by those of `path` (`test(model_path)`)."""

    def on_resize_start(self, learner: str, rows: Mapping[str, Any]) -> None:
        """Before parameters of a learner change their rows; `rows`: name → `engine.surgery.Rows`."""

    def on_resize_end(self, learner: str, rows: Mapping[str, Any]) -> None:
        """After it: weights and optimizer states have their new shapes."""

    def on_non_finite(self, error: NonFiniteError) -> bool:
        """As a callback's: True where `request_rewind` made it good."""
        return False

    def on_train_end(self) -> None:
        """No further step follows; the last evaluation and checkpoint are done."""

    def on_test_start(self) -> None:
        """The test sets follow; the model is in eval mode."""

    def on_test_end(self, results: dict[str, float]) -> None:
        """All test sets are through; values added to `results` join the test line."""

    def on_run_end(self, result: Result) -> None:
        """The last moment, with what the run came to."""

    def around_step(self) -> AbstractContextManager[Any] | None:
        """What the forwards, backwards and the update of a step run inside, or None."""
        return None

    def around_evaluate(self) -> AbstractContextManager[Any] | None:
        """What an evaluation's batches run inside, or None."""
        return None

    def around_export(self) -> AbstractContextManager[Any] | None:
        """What the writing of weights for other programs runs inside, or None."""
        return None
