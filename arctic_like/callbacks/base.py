"""The moments of a run, and Callback, whose methods they are.

The same methods exist, empty, on Trainer (called first) and on Callback (called by `priority`, then
in the recipe's order). This is the whole run:

    on_run_start
      on_setup_start
        on_part_start(part) · on_part_end(part)          tokenizer, data; of each learner: model,
                                                         optimizer, engine, scheduler
      on_setup_end
      on_train_start
        on_evaluate_start · on_evaluate_end(results)     if eval_at_start
        for each epoch:
          on_epoch_start
          for each step:                                 a step is an optimizer step
            on_step_start                                ┐ around_step
            for each micro-batch:                        │ (of every learner that is updated)
              on_micro_batch_start(batch)
                loss(batch), backward
              on_micro_batch_end(batch, loss)
            on_gradients_ready                           │ reduced, before clipping
            on_optimizer_step_start                      │
            on_optimizer_step_end                        ┘
            on_step_end
            on_log(values)                               may add values to the line
            [epoch over:] on_epoch_end
            [evaluation due:]
              on_evaluate_start                          ┐ around_evaluate
                on_evaluate_batch_start(batch)           │
                on_evaluate_batch_end(batch, loss)       │
              on_evaluate_end(results)                   ┘ may add values to the line
            [checkpoint due:]
              on_checkpoint_start · on_checkpoint_end(path)
      [last evaluation and checkpoint:] as above
      exporters write                                  ] around_export
      on_train_end
      [test_at_end:]
        on_test_start · … evaluation batches … · on_test_end(results)
    on_run_end(result)

Besides, when they happen: on_checkpoint_loaded(path), on_stop_requested(reason),
on_interrupt, on_exception(error), on_non_finite(error), which may answer True,
on_weights_loaded(path), on_resize_start(learner, rows) and on_resize_end(learner, rows) around a
change of parameters' shapes (`trainer.resize`).

`around_step`, `around_evaluate` (tests too) and `around_export` (weights that are written for others)
return a context manager or None; what they return is entered before the moments that the bracket spans
and left after them, in the reverse order.

A callback may ask for things: `trainer.request_stop()`, `request_evaluation()`,
`request_checkpoint()`, `request_log()`. One rank that asks is enough: all ranks learn of it in the
exchange before the next step and do it together, at the step that is done then. Moments of one's
own: `trainer.emit("after_densify", rows)` reaches every callback that has the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arctic_like.config.base import PartConfig
from arctic_like.registry import Part

if TYPE_CHECKING:
    from arctic_like.errors import NonFiniteError
    from arctic_like.trainer.base import Trainer
    from arctic_like.trainer.progress import Result

MOMENTS = (
    "on_run_start", "on_setup_start", "on_part_start", "on_part_end", "on_setup_end",
    "on_train_start", "on_epoch_start", "on_step_start", "on_micro_batch_start",
    "on_micro_batch_end", "on_gradients_ready", "on_optimizer_step_start",
    "on_optimizer_step_end", "on_step_end", "on_log", "on_epoch_end", "on_evaluate_start",
    "on_evaluate_batch_start", "on_evaluate_batch_end", "on_evaluate_end", "on_checkpoint_start",
    "on_checkpoint_end", "on_checkpoint_loaded", "on_stop_requested", "on_interrupt",
    "on_exception", "on_weights_loaded", "on_resize_start", "on_resize_end", "on_train_end",
    "on_test_start", "on_test_end", "on_run_end",
)  # fmt: skip


class CallbackConfig(PartConfig):
    """What every callback's entry in the recipe may say."""

    priority: int = 0
    """Lower is called earlier; equal ones in the recipe's order."""


class Callback(Part, family="callback"):
    """Cares what the run is *doing* (what the model *is* belongs in the trainer).

    Every method receives the trainer. Methods run on all ranks unless `main_rank_only`.
    """

    config_type = CallbackConfig
    config: Any
    main_rank_only: bool = False
    """Call this callback's moments on rank zero alone (it must then make no collective call)."""
    needs_whole_rows: bool = False
    """It reads or changes the tokens of a batch in the model: refused where ranks share rows."""

    needs_whole_layers: bool = False
    """It calls the model on one rank by itself, or needs its weights whole: refused where ranks share
    layers."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: plain types and tensors only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def load_states(self, states: Sequence[dict[str, Any]], *, own: int) -> None:
        """Take back the states of all ranks that saved, `own` the one that is this rank's (0 at another
        number of ranks). For callbacks whose ranks have parts of one whole; else `load_state_dict`."""
        self.load_state_dict(states[own])

    def summary(self) -> list[tuple[str, float, float]]:
        """Rows (label, first, last) for the table that ends a run; empty for none."""
        return []

    def on_run_start(self, trainer: Trainer) -> None:
        """Before anything is built."""

    def on_setup_start(self, trainer: Trainer) -> None:
        """Before the first part is built."""

    def on_part_start(self, trainer: Trainer, part: str) -> None:
        """Before a part is built; `part` is its key in the recipe."""

    def on_part_end(self, trainer: Trainer, part: str) -> None:
        """After a part was built."""

    def on_setup_end(self, trainer: Trainer) -> None:
        """Everything is built and, when resuming, loaded."""

    def on_train_start(self, trainer: Trainer) -> None:
        """Before the first evaluation and step of this process."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Before the first step of an epoch (or of its rest, when resuming)."""

    def on_step_start(self, trainer: Trainer) -> None:
        """The global batch and its weight are known; `global_step` counts the steps done so far."""

    def on_micro_batch_start(self, trainer: Trainer, batch: Any) -> None:
        """Before the forward of a micro-batch, which is on the device."""

    def on_micro_batch_end(self, trainer: Trainer, batch: Any, loss: Any) -> None:
        """After its backward; `loss` is the `Loss`, its mean detached from nothing yet freed."""

    def on_gradients_ready(self, trainer: Trainer) -> None:
        """All micro-batches are through; gradients are neither clipped nor applied."""

    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        """Directly before the update."""

    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        """Directly after the update, before the scheduler moves."""

    def on_step_end(self, trainer: Trainer) -> None:
        """`global_step` counts the step that just ended."""

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """A train line is about to be written (rank zero has the values that count)."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """The epoch's last step is done; its evaluation and checkpoint follow."""

    def on_evaluate_start(self, trainer: Trainer) -> None:
        """The model is in eval mode; random generators are put back afterwards."""

    def on_evaluate_batch_start(self, trainer: Trainer, batch: Any) -> None:
        """Before an evaluation micro-batch."""

    def on_evaluate_batch_end(self, trainer: Trainer, batch: Any, loss: Any) -> None:
        """After an evaluation micro-batch."""

    def on_evaluate_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """All sets are through; values added to `results` join the evaluation line."""

    def on_checkpoint_start(self, trainer: Trainer) -> None:
        """Before a checkpoint is written."""

    def on_checkpoint_end(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is complete and visible at `path`."""

    def on_checkpoint_loaded(self, trainer: Trainer, path: Path) -> None:
        """The run continues from `path`."""

    def on_stop_requested(self, trainer: Trainer, reason: str) -> None:
        """All ranks agreed to stop."""

    def on_interrupt(self, trainer: Trainer) -> None:
        """The stop was asked by a signal."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """The run is ending with an error on this rank."""

    def on_non_finite(self, trainer: Trainer, error: NonFiniteError) -> bool:
        """A loss or gradient is not finite, on all ranks; the run ends with the error unless a callback
        answers True, having asked for `trainer.request_rewind`. All ranks must answer alike."""
        return False

    def on_weights_loaded(self, trainer: Trainer, path: Path) -> None:
        """The main model's weights were replaced by those of `path` (`test(model_path)`)."""

    def on_resize_start(self, trainer: Trainer, learner: str, rows: Mapping[str, Any]) -> None:
        """Before parameters of a learner change their rows; `rows`: name → `engine.surgery.Rows`."""

    def on_resize_end(self, trainer: Trainer, learner: str, rows: Mapping[str, Any]) -> None:
        """After it: weights and optimizer states have their new shapes."""

    def on_train_end(self, trainer: Trainer) -> None:
        """No further step follows; the last evaluation and checkpoint are done."""

    def on_test_start(self, trainer: Trainer) -> None:
        """The test sets follow; the model is in eval mode."""

    def on_test_end(self, trainer: Trainer, results: dict[str, float]) -> None:
        """All test sets are through; values added to `results` join the test line."""

    def on_run_end(self, trainer: Trainer, result: Result) -> None:
        """The last moment, with what the run came to."""

    def around_step(self, trainer: Trainer) -> AbstractContextManager[Any] | None:
        """What the forwards, backwards and the update of a step run inside, or None."""
        return None

    def around_evaluate(self, trainer: Trainer) -> AbstractContextManager[Any] | None:
        """What an evaluation's batches run inside, or None."""
        return None

    def around_export(self, trainer: Trainer) -> AbstractContextManager[Any] | None:
        """What the writing of weights for other programs runs inside, or None."""
        return None


_NOTHING: AbstractContextManager[Any] = nullcontext()


class CallbackList:
    """Calls each moment of those callbacks that have it; a moment nobody has costs one look-up."""

    def __init__(self, callbacks: Sequence[Callback], *, is_main: bool) -> None:
        self.all = sorted(callbacks, key=lambda callback: callback.config.priority)
        self._active = [c for c in self.all if is_main or not c.main_rank_only]
        self._methods: dict[str, list[tuple[Callback, Callable[..., Any]]]] = {}

    def call(self, moment: str, trainer: Trainer, *values: Any) -> None:
        """Call `moment` on every callback that overrides it, in order.

        An exception keeps its traceback and gains a note naming callback and moment.
        """
        methods = self._methods.get(moment)
        if methods is None:
            methods = self._methods[moment] = self._find(moment)
        for callback, method in methods:
            try:
                method(trainer, *values)
            except BaseException as error:
                error.add_note(f"in callback {callback.name!r} at {moment}")
                raise

    def ask(self, moment: str, trainer: Trainer, *values: Any) -> bool:
        """Whether any callback answers True; all are asked."""
        answers = [method(trainer, *values) for _, method in self._find(moment)]
        return True in answers

    def around(self, moment: str, trainer: Trainer) -> AbstractContextManager[Any]:
        """The context managers that the callbacks return for `moment`, entered in order."""
        methods = self._methods.get(moment)
        if methods is None:
            methods = self._methods[moment] = self._find(moment)
        if not methods:
            return _NOTHING
        stack = ExitStack()
        for callback, method in methods:
            try:
                context = method(trainer)
                if context is not None:
                    stack.enter_context(context)
            except BaseException as error:
                stack.close()
                error.add_note(f"in callback {callback.name!r} at {moment}")
                raise
        return stack

    def _find(self, moment: str) -> list[tuple[Callback, Callable[..., Any]]]:
        empty = getattr(Callback, moment, None)
        found = []
        for callback in self._active:
            if getattr(type(callback), moment, empty) is not empty:
                found.append((callback, getattr(callback, moment)))
        return found
