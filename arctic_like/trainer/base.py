"""The Trainer: train / epoch / step / loss / evaluate / checkpoint, exact at every ZeRO stage.

The loop, and nothing that builds it (`assembly.py`), adds up its numbers (`ledger.py`) or writes its
checkpoints (`checkpoint/`). What is true of every step:

- A step is an optimizer step. `step(micro_batches)` gets all micro-batches of one global batch on this
  rank, each with the scale that makes the gradient the mean over the *global* weight.
- The weights of all ranks are known before the first forward, in one exchange of host values that also
  carries what callbacks asked for, so that all ranks stop, evaluate or save at the same step.
- Ranks do the same number of micro-batches; one with nothing to do runs a stand-in at scale zero.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.errors import NonFiniteError, RunError
from arctic_like.loss import Loss
from arctic_like.metrics.ledger import terms_of
from arctic_like.optimizer.base import OptimizerFactory
from arctic_like.registry import Part
from arctic_like.registry.factory_types import check_factory_types
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.evaluation import evaluate_set, takes_index
from arctic_like.trainer.failures import (
    fail_if_not_finite,
    fail_if_not_finite_so_far,
    in_evaluation,
    in_step,
    memory_errors_told,
    name_samples,
)
from arctic_like.trainer.lines import Lines
from arctic_like.trainer.moments import Moments
from arctic_like.trainer.numbers import Numbers
from arctic_like.trainer.phases import Phases
from arctic_like.trainer.progress import Progress, Result
from arctic_like.trainer.requests import Requests
from arctic_like.trainer.rewind import Rewind, checkpoint_before, go_back, remember
from arctic_like.trainer.startup import first_step_done
from arctic_like.trainer.surface import MAIN, Surface

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.data.loader import StepBatch
    from arctic_like.engine.surgery import Rows
    from arctic_like.trainer.assembly import Equipment, Session


@dataclass(frozen=True)
class WeightedBatch:
    """A micro-batch with its share in the step. `scale` turns its mean loss into what is back-propagated:
    weight × groups of ranks with rows of their own / weight of the global batch (DeepSpeed divides by all
    ranks; each of a group brings the whole of its loss)."""

    data: dict[str, Tensor]
    samples: list[int]
    weight: float
    scale: float


class Trainer(Part, Moments, Surface, family="trainer"):
    """What a recipe's `type:` names. A subclass writes at least `loss`.

    The `…_factory_type` attributes say which parts it works with: a class or a tuple of classes
    (the first is the default; subclasses of a listed one are welcome). They are checked when the class
    is defined. Built-in parts may be given by name, so that defining a trainer imports none of them.

    Its config may name further learners in fields of type `LearnerConfig` (`critic: LearnerConfig`);
    each becomes a model with optimizer, scheduler and engine of its own, `self.learners["critic"]`.
    """

    config_type = TrainerConfig
    config: Any
    data_factory_type: ClassVar[Any] = ("sft", "causal")
    model_factory_type: ClassVar[Any] = ("huggingface", "liger")
    tokenizer_factory_type: ClassVar[Any] = ("huggingface", "byte")
    optimizer_factory_type: ClassVar[Any] = ("adamw", OptimizerFactory)
    scheduler_factory_type: ClassVar[Any] = (
        "huggingface", "wsd", "cosine_with_floor", "plateau", "module.Class",
    )  # fmt: skip
    checkpoint_engine_type: ClassVar[Any] = ("deepspeed", "huggingface")
    weight_unit: ClassVar[str] = "samples"
    """What `weight(batch)` counts, in the plural: the name of its sum and its rate in train lines."""
    shares_sequences: ClassVar[bool] = False
    """Whether ranks may share rows (`sequence_parallel_size`): every rank of a group then gives the loss of
    the whole rows. A class that overrides what computes it says so anew (`trainer/sequence.py`)."""

    divides_models: ClassVar[bool] = False
    """Whether ranks may share layers (`deepspeed.tensor_parallel.autotp_size`): every rank of a group has the
    same rows and gives the same loss."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_factory_types(cls)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.progress = Progress()
        self.numbers = Numbers(config.metric_monitor)
        self.session: Session
        self.equipment: Equipment
        self.checkpoint_objects: dict[str, Any] = {}
        """Anything with `state_dict` and `load_state_dict` put here is saved and restored by name."""
        self.batch: StepBatch | None = None
        """The global batch of the step under way, or of the last one."""
        self.updating = MAIN
        """The learner that is being updated."""
        self.samples: list[int] = []
        """Numbers of the micro-batch's samples in their set, a row each."""
        self.evaluation_values: dict[str, Any] = {}
        """What the last evaluation measured that is no single number: name → tensor."""
        self._stream: Iterator[StepBatch] | None = None
        self._end_brackets: Callable[[], None] = lambda: None
        self.requests = Requests()
        self.lines = Lines()
        self.phases = Phases()
        """Which part of a step is under way, and how long each took."""
        self.evaluated_at = -1
        """The step of the last evaluation."""
        self._evaluations_made = 0
        self._steps_this_run = 0
        self._local_batches = 0

    @property
    def train_batches(self) -> Iterator[StepBatch]:
        """The global batches from here on, this rank's part of each; endless."""
        if self._stream is None:
            self._stream = self.equipment.loader.steps(self.progress.position)
            if self.config.overfit_first_batch:
                self._stream = _again_and_again(self.equipment.loader.steps(0))
        return self._stream

    # What a subclass writes or overrides ----------------------------------------------------------

    def loss(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """The mean loss of a micro-batch over `weight(batch)`: a scalar with gradient, or a `Loss`.

        batch: what the data factory collated, on the device.
        """
        raise NotImplementedError(
            f"{type(self).__name__} writes neither loss(self, batch) nor training_step(self, batch)"
        )

    def training_step(self, batch: dict[str, Tensor]) -> Tensor | Loss:
        """Another name of `loss`, which may also be written `training_step(self, batch, batch_idx)`;
        `batch_idx` counts this rank's micro-batches of the epoch. The loop calls this one."""
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor]) -> Any:
        """What an evaluation measures of a batch: the loss, or a map of named values with it
        (`trainer/evaluation.py`). May be written `validation_step(self, batch, batch_idx)`."""
        return self.loss(batch)

    def test_step(self, batch: dict[str, Tensor]) -> Any:
        """What a test measures of a batch; `validation_step` unless overridden."""
        return self.validation_step(batch)

    def get_val_metrics(self) -> dict[str, Any]:
        """Name → torchmetrics object, made once for each run: computed and reset at the end of every
        evaluation set under that name. `validation_step` updates them (`self.val_metrics[name]`)."""
        return {}

    def weight(self, batch: dict[str, Tensor]) -> float:
        """What the mean of `loss` is taken over: trained labels, pairs, rows … A pure function of the
        batch, which is still on the host: known for the whole global batch before the first forward.

        Without an override: trained labels where the batch has `input_ids` and `labels`, else rows.
        """
        from arctic_like.trainer.losses import rows_of, trained_labels

        if isinstance(batch, Mapping) and {"input_ids", "labels"} <= batch.keys():
            return trained_labels(batch["labels"])
        return rows_of(batch)

    def setup(self, session: Session) -> None:
        """Build every part, and take up the checkpoint that the session names. Collective."""
        from loguru import logger

        from arctic_like.trainer.assembly import assemble
        from arctic_like.trainer.trial import try_before_resuming

        self.session = session
        self.equipment = assemble(self, session)
        self.phases.use(self.device)
        if self.world.size > 1 and self.device == "cpu":
            self.measure_communication()
        self.configure()
        saved = None
        if session.resume is not None:
            try_before_resuming(self, session.resume)
            saved = self.equipment.saver.load(self, session.resume)
        with self.preserve_random_state():  # what consoles and trackers import draws from it
            self.equipment.recorder.start(saved=saved["metrics"] if saved else None)
        remember(self)
        if session.resume is not None:
            logger.info(f"resumed from {session.resume} at step {self.global_step}")
            self.emit("on_checkpoint_loaded", session.resume)
        self.emit("on_setup_end")
        session.start_up.lap("rest")

    def measure_communication(self) -> None:
        """Count DeepSpeed's exchanges to `time/communication`, rather than to the phases they happen in:
        always so on a CPU. On CUDA it is what the device waits for, at the price of four events for each
        exchange, hundreds a step at stage 3; `arctic-train profile` pays it."""
        from arctic_like.engine.exchanges import bracket_exchanges

        self._end_brackets()
        self._end_brackets = bracket_exchanges(lambda: self.phases.during("communication"))

    def configure(self) -> None:
        """Called when every part is built, before a checkpoint is loaded: the place to make what the
        trainer needs of its own (and to put it into `checkpoint_objects`)."""

    def teardown(self, exit_code: int, error: BaseException | None = None) -> None:
        """Tell the callbacks of an error, close files and trackers, free the engines."""
        equipment = getattr(self, "equipment", None)
        if equipment is None:
            return
        if error is not None:
            with contextlib.suppress(Exception):
                self.emit("on_exception", error)
        self._stream = None
        equipment.saver.give_up()
        equipment.recorder.finish(exit_code)
        self._end_brackets()
        for learner in equipment.learners.values():
            learner.engine.destroy()

    def train(self) -> Result:
        """The whole run from where it stands; returns what it came to."""
        if self.config.test_only:
            self.test()
            return self.result()
        self.emit("on_train_start")
        if self.config.eval_at_start and self.global_step == 0:
            self.evaluate()
        self.lines.mark(self)
        while not self.is_done:
            self.epoch()
        self.phases.begin("stopped")
        self._finish()
        self.equipment.saver.settle(self)
        for learner in self.learners.values():
            learner.finish_training()
        if self.is_complete:
            self.export()
        self.emit("on_train_end")
        if self.config.test_at_end and self.is_complete:
            self.test()
        return self.result()

    def fit(self) -> Result:
        """Another name of `train`."""
        return self.train()

    def epoch(self) -> None:
        """The steps that are left of the current epoch, or fewer if the run ends."""
        epoch = self.current_epoch
        self.emit("on_epoch_start")
        while not self.is_done and self.current_epoch == epoch:
            if self._pass_over():
                continue
            try:
                self._next_step()
            except NonFiniteError as error:
                if not self._is_dealt_with(error):
                    raise
            if self.requests.rewind is not None:
                self._go_back(self.requests.rewind)

    def _next_step(self) -> None:
        self.phases.begin("data")
        batch = next(self.train_batches)
        micro_batches = self._weigh(batch)
        if self.progress.stopped:
            return
        self.phases.begin("other")
        self.batch = batch
        with memory_errors_told(self, in_step), self.around("around_step"):
            self.emit("on_step_start")
            self.step(micro_batches)
        self._after_step(batch)

    def step(self, micro_batches: Sequence[WeightedBatch]) -> None:
        """One optimizer step over this rank's micro-batches of one global batch.

        A trainer with several learners overrides it with an `update` of each, in its order.
        """
        self.update(MAIN, micro_batches)

    def update(
        self, learner: str, micro_batches: Sequence[WeightedBatch],
        loss: Callable[[Any], Tensor | Loss] | None = None,
    ) -> None:  # fmt: skip
        """Update one learner once: forward and backward of every micro-batch, clip, optimizer step.

        loss: called with the batch on the device; `training_step` unless given. Meanwhile the other
        learners are frozen: gradients flow through them and do not reach their weights; call their plain
        `module`. Moments are those of a step, and `updating` names the learner.

        An fp16 overflow, which DeepSpeed skips, is not a step: the same micro-batches are done
        again at the lower loss scale, so that no sample is lost and neither counter nor schedule moves.
        """
        one = self.learner(learner)
        compute = loss or self._training_step
        self.updating = learner
        one.engine.reserve_states()
        with self._others_frozen(learner):
            while True:
                losses = []
                for index, micro in enumerate(micro_batches):
                    self.session.micro_batch, self.samples = index, micro.samples
                    self.phases.begin("data")
                    batch = self.to_device(micro.data)
                    self.phases.begin("forward")
                    self.emit("on_micro_batch_start", batch)
                    found = self.checked_loss(compute(batch), micro.weight)
                    self.phases.begin("backward")
                    one.engine.backward(
                        found.mean * micro.scale, last=index == len(micro_batches) - 1
                    )
                    self.emit("on_micro_batch_end", batch, found)
                    losses.append(found)
                self.phases.begin("optimizer")
                self.emit("on_gradients_ready")
                self.emit("on_optimizer_step_start")
                applied = one.engine.step()
                self.emit("on_optimizer_step_end")
                if applied or not one.engine.is_fp16:
                    break
        self.phases.begin("other")
        prefix = "" if learner == MAIN else f"{learner}/"
        for found, micro in zip(losses, micro_batches, strict=True):
            weight = micro.weight if self.world.counts else 0.0
            terms = terms_of(found, weight, step=self.global_step + 1, prefix=prefix)
            self.equipment.step_ledger.add(terms)
            self.equipment.epoch_ledger.add(terms)
        self.updating = MAIN
        if not applied:
            fail_if_not_finite_so_far(self)
            fail_if_not_finite(self, float("inf"), what=f"{prefix}gradient norm")

    def evaluate(self) -> dict[str, float]:
        """Every evaluation set through `validation_step`; means weighted over all ranks.

        Leaves training's mode and random generators as they were; writes the evaluation line.
        """
        results: dict[str, float] = {}
        self.evaluation_values = {}
        with (
            memory_errors_told(self, in_evaluation),
            self.phases.during("evaluation"),
            self._evaluating(),
            self.around("around_evaluate"),
        ):
            self.emit("on_evaluate_start")
            for name, batches in self.equipment.evaluation_batches():
                prefix = "eval/" if name in ("", "eval") else f"eval/{name}/"
                self._measure(prefix, batches, self.validation_step, results)
            self.emit("on_evaluate_end", results)
        self.evaluated_at = self.global_step
        self._evaluations_made += 1
        if self.numbers.evaluated(self.global_step, results) and self.global_step > 0:
            self.requests.wishes |= {"best"} if self.equipment.saver.saves_best else set()
        for learner in self.learners.values():
            learner.after_evaluation(results, self.session.host)
        every = self.config.eval_log_iter_interval
        if results and every and self._evaluations_made % every == 0:
            self.log(results, kind="evaluation")
        return results

    def test(self, model_path: Path | str | None = None) -> dict[str, float]:
        """Every test set through `test_step`; writes the test line.

        model_path: an exported folder or a checkpoint whose weights are measured in place of those
        of the run; they stay.
        """
        if model_path is not None:
            self.equipment.saver.load_weights(self, Path(model_path))
            self.emit("on_weights_loaded", Path(model_path))
        results: dict[str, float] = {}
        with (
            memory_errors_told(self, in_evaluation),
            self._evaluating(),
            self.around("around_evaluate"),
        ):
            self.emit("on_test_start")
            own = type(self).test_step is not Trainer.test_step
            step: Callable[..., Any] = self.test_step if own else self.validation_step
            for name, batches in self.equipment.test_batches():
                prefix = "test/" if name in ("", "test") else f"test/{name}/"
                self._measure(prefix, batches, step, results)
            self.emit("on_test_end", results)
        self.numbers.take_in(results)
        if results:
            self.log(results, kind="evaluation")
        return results

    def checkpoint(self) -> None:
        """Write, with every engine of the recipe that is due, what belongs into its checkpoint."""
        with self.phases.during("checkpoint"):
            fail_if_not_finite_so_far(self)
            self.equipment.saver.save(self)

    def export(self) -> None:
        """Write the trained models with the recipe's exporters. Collective."""
        from arctic_like.checkpoint.exporters import whole_copy

        error: BaseException | None = None
        with self.around("around_export"):
            for exporter in self.equipment.exporters:
                with whole_copy(self.get_module(exporter.config.learner)) as module:
                    if module is None or error is not None:
                        continue
                    folder = self.session.directory.path / "exports"
                    try:
                        example = self.example_inputs() if exporter.needs_example else ()
                        self.equipment.saver.exports.append(
                            exporter.export(module, folder, example)
                        )
                    except BaseException as problem:
                        error = problem
        if self.equipment.exporters:
            self.session.host.raise_together(error)

    def example_inputs(self) -> tuple[Any, ...]:
        """One row of what the main model is called with, on the CPU, for exporters that trace it."""
        samples = self.equipment.data.train or next(iter(self.equipment.data.test.values()))
        batch = self.equipment.data.collate([samples[0], samples[0]])
        inputs = self.model_arguments(batch)
        return tuple(value.float() if value.is_floating_point() else value for value in inputs)

    def model_arguments(self, batch: Any) -> tuple[Any, ...]:
        """What the main model is called with for a batch, as positional arguments."""
        raise NotImplementedError(
            f"{type(self).__name__} does not write model_arguments(self, batch), which an exporter asks for"
        )

    # Helpers for subclasses and callbacks ---------------------------------------------------------

    def to_device(self, batch: Any) -> Any:
        """Nested tensors moved to the device; everything else as it is. Called for whole batches alone."""
        return batch if self.device == "cpu" else _moved(batch, self.device)

    def emit(self, moment: str, *values: Any) -> None:
        """Call a moment on this trainer, then on every callback that has it. Own names are welcome."""
        method = getattr(self, moment, None)
        if method is not None:
            method(*values)
        self.equipment.callbacks.call(moment, self, *values)

    def around(self, moment: str) -> contextlib.AbstractContextManager[Any]:
        """The context managers that this trainer and its callbacks return for `moment`, entered."""
        own = getattr(self, moment)()
        theirs = self.equipment.callbacks.around(moment, self)
        if own is None:
            return theirs
        stack = contextlib.ExitStack()
        stack.enter_context(own)
        stack.enter_context(theirs)
        return stack

    @contextlib.contextmanager
    def clock_stopped(self, phase: str = "stopped") -> Iterator[None]:
        """What happens inside does not count into the step time of the next train line.

        phase: `evaluation` and `checkpoint` are in the line with their own time."""
        start = time.perf_counter()
        with self.phases.during(phase):
            yield
        self.lines.leave_out(time.perf_counter() - start)

    def is_due(self, interval: Any, name: str) -> bool:
        """Whether an interval is due after the step that was just done; `name` tells clocks apart.
        Ranks agree. Collective where it is one of time."""
        return self.lines.due(self, interval, name)

    def call_hook(self, moment: str, *values: Any) -> None:
        """Another name of `emit`."""
        self.emit(moment, *values)

    def log(self, values: Mapping[str, Any], *, kind: str = "values") -> None:
        """Write one line to metrics.jsonl and the trackers (rank zero does; others return)."""
        plan = self.equipment.plan
        line = {
            "step": self.global_step,
            "epoch": self.progress.position / plan.samples_per_epoch,
            **values,
        }
        if kind != "evaluation":
            self.numbers.take_in(values)
        self.equipment.recorder.write(line, kind=kind)

    def evaluations(self) -> dict[str, tuple[float, float, int]]:
        """Of every evaluation metric: its first value, its last, and how often it was measured."""
        return dict(self.numbers.evaluations)

    @cached_property
    def val_metrics(self) -> dict[str, Any]:
        """The objects of `get_val_metrics`, on the device."""
        return {
            name: metric.to(self.device) if hasattr(metric, "to") else metric
            for name, metric in self.get_val_metrics().items()
        }

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sum of host values over all ranks. Collective."""
        return self.session.host.sum(values)

    def preserve_random_state(self) -> contextlib.AbstractContextManager[None]:
        """A context after which all random generators are as they were before."""
        from arctic_like.engine.random_state import preserved

        return preserved()

    def request_stop(self, reason: str = "callback", *, concludes: bool = False) -> None:
        """Ask for the run to end before the next step; one rank is enough, all agree.

        reason: a word for `Result.stop_reason`. concludes: the training has reached its goal: what the
        recipe says of its end (last evaluation, exports, test) is done, as after the last step.
        """
        self.session.requested, self.session.concludes = reason, concludes

    def request_rewind(
        self, *, before: int, skip: Sequence[int] = (), reason: str, most: int = 3
    ) -> bool:  # fmt: skip
        """Ask for the run to go back to the newest checkpoint of a step before `before`, and to pass over
        the global batches at the positions `skip`; done when the train line is written, before anything is
        saved. Whether there is such a checkpoint. Collective: on all ranks alike, in a moment that all have.

        most: how often the run may go back to one checkpoint; then it ends with an error.
        """
        if checkpoint_before(self, before) is None:
            return False
        self.requests.rewind = Rewind(before, tuple(skip), reason, most)
        return True

    def request_evaluation(self) -> None:
        """Ask for an evaluation at the step that is done, unless it had one; one rank is enough."""
        self.requests.wishes.add("evaluation")

    def request_checkpoint(self) -> None:
        """Ask for a resumable checkpoint of the step that is done, unless it has one; one rank is enough."""
        self.requests.wishes.add("checkpoint")

    def request_log(self) -> None:
        """Ask for the train line of the step that is done, unless it was written; one rank is enough."""
        self.requests.wishes.add("log")

    def gradients(self, learner: str = MAIN) -> dict[str, Tensor]:
        """Parameter → full gradient of the step under way, float32, unscaled, the mean over the global
        batch; the same on all ranks, at every ZeRO stage. Between `on_gradients_ready` and
        `on_optimizer_step_start`. Collective."""
        return self.learner(learner).engine.gradients()

    def set_gradients(self, values: Mapping[str, Tensor], learner: str = MAIN) -> None:
        """Replace full gradients by name; the others stay. The same on all ranks. Collective."""
        self.learner(learner).engine.set_gradients(values)

    def resize(self, rows: Mapping[str, Rows], learner: str = MAIN) -> None:
        """Grow and prune rows of parameters together with their optimizer state, at every ZeRO stage
        (`engine/surgery.py`). The same on all ranks. Collective."""
        self.emit("on_resize_start", learner, rows)
        self.learner(learner).engine.resize(rows)
        self.emit("on_resize_end", learner, rows)

    def get_extra_state(self) -> dict[str, Any]:
        """What a subclass wants back after a resume, beside models and counters: plain types and tensors."""
        return {}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_extra_state` gave."""

    def state_dict(self) -> dict[str, Any]:
        """The whole training state in memory: models, optimizers, schedulers, counters, generators,
        callbacks, objects; each rank's part of it. Collective."""
        from arctic_like.trainer.whole_state import whole_state

        return whole_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, at the same number of ranks. Collective."""
        from arctic_like.trainer.whole_state import take_whole_state

        take_whole_state(self, state)

    def last_values(self) -> dict[str, Any]:
        """What a checkpoint keeps of the metrics: the last and best values and when was evaluated."""
        return {
            **self.numbers.as_dict(),
            "evaluated_at": self.evaluated_at,
            "evaluations_made": self._evaluations_made,
        }

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `run.json`: counters and last values."""
        self.progress = Progress(**{**saved["progress"], "stopped": ""})
        self.numbers.take_up(saved["last"])
        self.evaluated_at = saved["last"]["evaluated_at"]
        self._evaluations_made = saved["last"]["evaluations_made"]
        self.lines.last = -1
        self._stream = None

    @property
    def batch_idx(self) -> int:
        """The number of this rank's current micro-batch in the epoch, from 0."""
        plan, info = self.equipment.plan, self.equipment.info
        steps = (self.progress.position % plan.samples_per_epoch) // plan.global_batch_size
        return int(steps * info.gradient_accumulation_steps + self.session.micro_batch)

    @property
    def is_complete(self) -> bool:
        """Whether the training is not stopped, or stopped because it has reached its goal."""
        return not self.progress.stopped or self.requests.concluded

    @property
    def moment(self) -> tuple[int, int]:
        """(steps, evaluations) done: what a checkpoint is of."""
        return self.global_step, self._evaluations_made

    # The loop's own business ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _others_frozen(self, learner: str) -> Iterator[None]:
        if len(self.learners) == 1:
            yield
            return
        with contextlib.ExitStack() as stack:
            for name, other in self.learners.items():
                if name != learner:
                    stack.enter_context(other.engine.frozen())
            yield

    @cached_property
    def _training_step(self) -> Callable[[Any], Tensor | Loss]:
        step: Callable[..., Any] = self.training_step
        if takes_index(step):
            return lambda batch: step(batch, self.batch_idx)
        return step

    def _is_dealt_with(self, error: NonFiniteError) -> bool:
        """Whether a callback has asked to go back rather than to end with the error."""
        own = self.on_non_finite(error)
        theirs = self.equipment.callbacks.ask("on_non_finite", self, error)
        return own or theirs

    def _go_back(self, asked: Rewind) -> None:
        self.requests.rewind = None
        with self.clock_stopped():
            go_back(self, asked)
            self.requests.wishes.clear()
        self.lines.mark(self)

    def _pass_over(self) -> bool:
        """Move the position past a batch that is to be skipped; an epoch that ends with it has its end."""
        progress, plan = self.progress, self.equipment.plan
        if progress.position not in progress.skipped:
            return False
        progress.position = plan.at(progress.position).next_position
        self._stream = None
        if progress.position % plan.samples_per_epoch == 0:
            with self.clock_stopped():
                self.emit("on_epoch_end")
                self.lines.write_epoch(self)
                if self.equipment.saver.due(self, epoch_over=True):
                    self.checkpoint()
        return True

    def _weigh(self, batch: StepBatch) -> list[WeightedBatch]:
        """Weights of this rank and over all ranks, and what anyone asks for: one exchange.

        What was asked for is done here, at the step that is done, before the next one begins.
        """
        weights = [0.0 if m.idle else float(self.weight(m.data)) for m in batch.micro_batches]
        with self.phases.during("communication"):
            total = self.requests.agree(self, sum(weights) if self.world.counts else 0.0)
        if self.progress.stopped:
            return []
        if total <= 0:
            raise RunError(
                f"step {self.global_step + 1} has nothing to train: the weight of its "
                f"{len(batch.global_batch.samples)} samples is {total} "
                f"({name_samples(self, batch)}); check weight(batch)"
            )
        self.session.step_weight = total
        share = self.world.data_size / total
        return [
            WeightedBatch(m.data, m.samples, w, w * share)
            for m, w in zip(batch.micro_batches, weights, strict=True)
        ]

    def checked_loss(self, loss: Any, weight: float) -> Loss:
        """The one place where a scalar or a `Loss` becomes one form. Raises RunError for any other."""
        found = loss if isinstance(loss, Loss) else Loss(loss)
        if found.weight is not None and weight and float(found.weight) != weight:
            raise RunError(
                f"{type(self).__name__}.loss says its mean is over {found.weight}, but weight(batch) is "
                f"{weight}; the gradient would be scaled wrongly. Let both count the same"
            )
        shape = getattr(found.mean, "shape", None)
        if shape is None or len(shape):
            what = (
                type(found.mean).__name__ if shape is None else f"a tensor of shape {tuple(shape)}"
            )
            raise RunError(
                f"{type(self).__name__}.loss returned {what}; "
                "it must be the scalar mean over weight(batch)"
            )
        return found

    def _after_step(self, batch: StepBatch) -> None:
        """Counters, line, evaluation, epoch's end and checkpoint of the step that was just done."""
        equipment = self.equipment
        self.progress.finished = False
        self.progress.global_step += 1
        self.progress.position += len(batch.global_batch.samples)
        self._steps_this_run += 1
        self._local_batches += len(batch.micro_batches)
        if self._steps_this_run == 1:
            first_step_done(self)
            equipment.saver.prepare(self)
        self.lines.note_rates(self)
        for learner in self.learners.values():
            learner.after_step()
        self.emit("on_step_end")
        epoch_over = self.progress.position % self.equipment.plan.samples_per_epoch == 0
        logs = self.config.train_log_iter_interval
        if self.lines.due(self, logs, "log") or (
            logs and self.global_step == self.training_horizon
        ):
            self.lines.write_step(self)
        if self.requests.rewind is not None:
            return
        with self.clock_stopped():
            if epoch_over:
                self.emit("on_epoch_end")
            if self.lines.due(self, self.config.eval_interval, "evaluation"):
                self.evaluate()
            if epoch_over:
                self.lines.write_epoch(self)
            self._exit_if_asked()
            if self.requests.rewind is None and equipment.saver.due(self, epoch_over=epoch_over):
                self.checkpoint()

    def _exit_if_asked(self) -> None:
        config = self.config
        for limit, count in ((config.exit_iteration, self.global_step),
                             (config.exit_iteration_this_run, self._steps_this_run)):  # fmt: skip
            if limit and count >= limit and not self.is_done:
                self.requests.stop(self, "exit_iteration")

    def _measure(
        self, prefix: str, batches: Any, step: Callable[..., Any], results: dict[str, float]
    ) -> None:
        numbers, others = evaluate_set(self, batches, step)
        results.update({f"{prefix}{key}": value for key, value in numbers.items()})
        self.evaluation_values.update({f"{prefix}{key}": value for key, value in others.items()})

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        import torch

        modules = [learner.engine.module for learner in self.learners.values()]
        modes = [module.training for module in modules]
        with contextlib.ExitStack() as stack:
            for learner in self.learners.values():
                stack.enter_context(learner.evaluating())
            for module in modules:
                module.eval()
            try:
                with torch.no_grad(), self.preserve_random_state():
                    yield
            finally:
                for module, mode in zip(modules, modes, strict=True):
                    module.train(mode)

    def _finish(self) -> None:
        """The last evaluation and checkpoints; nothing where a resumed run had already done them."""
        progress = self.progress
        if self.is_complete and progress.finished:
            return
        if self.is_complete:
            if self.config.eval_at_end and self.evaluated_at != self.global_step:
                self.evaluate()
            self.requests.agree(self)  # what callbacks asked for at the last step
            if self.global_step >= self.training_horizon:
                progress.stopped, self.requests.concluded = "", False
        finished = progress.finished = self.is_complete
        if self.equipment.saver.due(self, at_end=finished, at_stop=not finished):
            self.checkpoint()

    def result(self) -> Result:
        """What the run has come to so far; after the end, what it came to."""
        reason = self.progress.stopped or "finished"
        saver, numbers = self.equipment.saver, self.numbers
        return Result(
            steps=self.global_step,
            stop_reason=reason,
            output_dir=self.session.directory.path,
            metrics=dict(numbers.last),
            best=dict(numbers.best),
            history=tuple(numbers.history),
            final_loss=numbers.final_loss(),
            checkpoint=saver.newest(),
            exports=tuple(path for path in saver.exports if path.exists()),
            complete=self.is_complete,
            signal={"interrupt": 2, "terminate": 15}.get(reason, 0),
        )


def _again_and_again(stream: Iterator[Any]) -> Iterator[Any]:
    first = next(stream)
    while True:
        yield first


def _moved(batch: Any, device: str) -> Any:
    """See `Trainer.to_device`, which subclasses replace, for whole batches and not for what is in them."""
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch
