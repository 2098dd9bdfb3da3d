"""The Trainer: train / epoch / step / loss / evaluate / checkpoint, exact at every ZeRO stage.

The loop, and nothing that builds it (`assembly.py`), adds up its numbers (`ledger.py`) or writes its
checkpoints (`checkpoint/`). What is true of every step:

- A step is an optimizer step. `step(micro_batches)` gets all micro-batches of one global batch on this
  rank, each with the scale that makes the gradient the mean over the *global* weight.
- The weights of all ranks are known before the first forward, in one exchange of host values that also
  carries requests to stop, so that all ranks stop before the same step.
- Ranks do the same number of micro-batches; one with nothing to do runs a stand-in at scale zero.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from arctic_like.errors import NonFiniteError, RunError
from arctic_like.loss import Loss
from arctic_like.metrics.ledger import terms_of
from arctic_like.registry import Part
from arctic_like.registry.factory_types import check_factory_types
from arctic_like.trainer.config import TrainerConfig
from arctic_like.trainer.moments import Moments
from arctic_like.trainer.progress import Progress, Result

if TYPE_CHECKING:
    from torch import Tensor, nn

    from arctic_like.data.loader import MicroBatch, StepBatch
    from arctic_like.trainer.assembly import Equipment, Session
    from arctic_like.world import World

STOP_REASONS = ("interrupt", "terminate", "kill_switch", "callback")


@dataclass(frozen=True)
class WeightedBatch:
    """A micro-batch with its share in the step. `scale` turns its mean loss into what is back-propagated:
    weight × data-parallel ranks / weight of the global batch (DeepSpeed divides by the ranks)."""

    data: dict[str, Tensor]
    samples: list[int]
    weight: float
    scale: float


class Trainer(Part, Moments, family="trainer"):
    """What a recipe's `type:` names. A subclass writes at least `loss`.

    The `…_factory_type` attributes say which parts it works with: a class or a tuple of classes
    (the first is the default; subclasses of a listed one are welcome). They are checked when the class
    is defined. Built-in parts may be given by name, so that defining a trainer imports none of them.
    """

    config_type = TrainerConfig
    config: Any
    data_factory_type: ClassVar[Any] = ("sft", "causal")
    model_factory_type: ClassVar[Any] = ("huggingface", "liger")
    tokenizer_factory_type: ClassVar[Any] = ("huggingface", "byte")
    optimizer_factory_type: ClassVar[Any] = ("adamw", "fused_adam", "cpu_adam")
    scheduler_factory_type: ClassVar[Any] = ("huggingface", "wsd", "cosine_with_floor")
    checkpoint_engine_type: ClassVar[Any] = ("deepspeed", "huggingface")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_factory_types(cls)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.progress = Progress()
        self.session: Session
        self.equipment: Equipment
        self._stream: Iterator[StepBatch] | None = None
        self._last_evaluation = -1
        self._last_save = -1
        self._evaluations_made = 0
        self._steps_this_run = 0
        self._marks = {"step": time.perf_counter(), "line": 0}
        self._last_times: dict[str, float] = {}
        self._batch: StepBatch | None = None
        self._metrics: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._evaluations: dict[str, tuple[float, float, int]] = {}

    # What a run is asked about --------------------------------------------------------------------

    @property
    def world(self) -> World:
        """Ranks and this process's place among them."""
        return self.session.world

    @property
    def device(self) -> str:
        """Torch device string of this rank."""
        return self.world.device

    @property
    def global_step(self) -> int:
        """Optimizer steps done, before a resume included."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        """Whole epochs done; during an epoch its number, from 0."""
        return self.progress.position // self.equipment.plan.samples_per_epoch

    @property
    def epochs(self) -> float:
        """Passes over the training data that the run makes (a fraction with `train_iters`)."""
        return self.training_horizon / self.equipment.plan.batches_per_epoch

    @property
    def training_horizon(self) -> int:
        """Optimizer steps of the whole run; the learning-rate schedule covers exactly these."""
        return self.equipment.total_steps

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps in which the learning rate rises."""
        return self.equipment.warmup_steps

    @property
    def model(self) -> Any:
        """The model to call in `loss`: the DeepSpeed engine around `module`."""
        return self.equipment.learners["model"].engine.engine

    @property
    def module(self) -> nn.Module:
        """The plain model, without the engine around it."""
        return self.equipment.learners["model"].engine.module

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the recipe names."""
        return self.equipment.tokenizer

    @property
    def zero_stage(self) -> int:
        """ZeRO stage of the model's engine, 0 to 3."""
        return self.equipment.learners["model"].engine.zero_stage

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
        raise NotImplementedError(f"{type(self).__name__} does not write loss(self, batch)")

    def weight(self, batch: dict[str, Tensor]) -> float:
        """What the mean of `loss` is taken over: trained labels, pairs, rows … A pure function of the
        batch, which is still on the host: known for the whole global batch before the first forward.
        """
        from arctic_like.trainer.losses import trained_labels

        return trained_labels(batch["labels"])

    def setup(self, session: Session) -> None:
        """Build every part, and take up the checkpoint that the session names. Collective."""
        from loguru import logger

        from arctic_like.trainer.assembly import assemble

        self.session = session
        self.equipment = assemble(self, session)
        saved = None
        if session.resume is not None:
            saved = self.equipment.saver.load(self, session.resume)
        self.equipment.recorder.start(saved=saved["metrics"] if saved else None)
        if session.resume is not None:
            logger.info(f"resumed from {session.resume} at step {self.global_step}")
            self.emit("on_checkpoint_loaded", session.resume)
        self.emit("on_setup_end")

    def teardown(self, exit_code: int, error: BaseException | None = None) -> None:
        """Tell the callbacks of an error, close files and trackers, free the engines."""
        equipment = getattr(self, "equipment", None)
        if equipment is None:
            return
        if error is not None:
            with contextlib.suppress(Exception):
                self.emit("on_exception", error)
        self._stream = None
        equipment.recorder.finish(exit_code)
        for learner in equipment.learners.values():
            learner.engine.destroy()

    def train(self) -> Result:
        """The whole run from where it stands; returns what it came to."""
        self.emit("on_train_start")
        if self.config.eval_at_start and self.global_step == 0:
            self.evaluate()
        self._mark()
        while not self.is_done:
            self.epoch()
        self._finish()
        self.emit("on_train_end")
        return self._result()

    def epoch(self) -> None:
        """The steps that are left of the current epoch, or fewer if the run ends."""
        epoch = self.current_epoch
        self.emit("on_epoch_start")
        while not self.is_done and self.current_epoch == epoch:
            batch = next(self.train_batches)
            micro_batches = self._weigh(batch)
            if self.progress.stopped:
                return
            self._batch = batch
            self.emit("on_step_start")
            self.step(micro_batches)
            self._after_step(batch)

    def step(self, micro_batches: Sequence[WeightedBatch]) -> None:
        """One optimizer step over this rank's micro-batches of one global batch.

        An fp16 overflow, which DeepSpeed skips, is not a step: the same micro-batches are done
        again at the lower loss scale, so that no sample is lost and neither counter nor schedule moves.
        """
        engine = self.equipment.learners["model"].engine
        while True:
            losses = []
            for index, micro in enumerate(micro_batches):
                batch = self.to_device(micro.data)
                self.emit("on_micro_batch_start", batch)
                loss = self._loss(batch, micro.weight)
                engine.backward(loss.mean * micro.scale, last=index == len(micro_batches) - 1)
                self.emit("on_micro_batch_end", batch, loss)
                losses.append(loss)
            self.emit("on_gradients_ready")
            self.emit("on_optimizer_step_start")
            applied = engine.step()
            self.emit("on_optimizer_step_end")
            if applied or not engine.is_fp16:
                break
        for loss, micro in zip(losses, micro_batches, strict=True):
            terms = terms_of(loss, micro.weight, step=self.global_step + 1)
            self.equipment.step_ledger.add(terms)
            self.equipment.epoch_ledger.add(terms)
        if not applied:
            self._fail_if_not_finite_so_far()
            self._fail_if_not_finite(float("inf"), what="gradient norm")

    def evaluate(self) -> dict[str, float]:
        """Mean losses over the evaluation sets, weighted by trained tokens over all ranks.

        Leaves training's mode and random generators as they were; writes the evaluation line.
        """
        results: dict[str, float] = {}
        with self._evaluating():
            self.emit("on_evaluate_start")
            for name, batches in self.equipment.evaluation_batches():
                results.update(self._evaluate_set(name, batches))
            self.emit("on_evaluate_end", results)
        self._last_evaluation = self.global_step
        self._evaluations_made += 1
        every = self.config.eval_log_iter_interval
        if results and every and self._evaluations_made % every == 0:
            self.log(results, kind="evaluation")
        return results

    def checkpoint(self) -> None:
        """Write, with every engine of the recipe that is due, what belongs into its checkpoint."""
        self._fail_if_not_finite_so_far()
        self.equipment.saver.save(self)
        self._last_save = self.global_step

    # Helpers for subclasses and callbacks ---------------------------------------------------------

    def to_device(self, batch: Any) -> Any:
        """Nested tensors moved to the device; everything else as it is."""
        if self.device == "cpu":
            return batch
        if isinstance(batch, Mapping):
            return {key: self.to_device(value) for key, value in batch.items()}
        if isinstance(batch, (list, tuple)):
            return type(batch)(self.to_device(value) for value in batch)
        return batch.to(self.device, non_blocking=True) if hasattr(batch, "to") else batch

    def emit(self, moment: str, *values: Any) -> None:
        """Call a moment on this trainer, then on every callback that has it. Own names are welcome."""
        method = getattr(self, moment, None)
        if method is not None:
            method(*values)
        self.equipment.callbacks.call(moment, self, *values)

    def log(self, values: Mapping[str, Any], *, kind: str = "values") -> None:
        """Write one line to metrics.jsonl and the trackers (rank zero does; others return)."""
        plan = self.equipment.plan
        line = {
            "step": self.global_step,
            "epoch": self.progress.position / plan.samples_per_epoch,
            **values,
        }
        self._metrics.update(
            {k: float(v) for k, v in values.items() if isinstance(v, (int, float))}
        )
        for name, value in values.items():
            if isinstance(value, float) and name.startswith("eval/"):
                self._remember(name, value)
        self.equipment.recorder.write(line, kind=kind)

    def _remember(self, name: str, value: float) -> None:
        have = self._best.get(name)
        if have is None or (value < have if "loss" in name else value > have):
            self._best[name] = value
        first, _, count = self._evaluations.get(name, (value, value, 0))
        self._evaluations[name] = (first, value, count + 1)

    def evaluations(self) -> dict[str, tuple[float, float, int]]:
        """Of every evaluation metric: its first value, its last, and how often it was measured."""
        return dict(self._evaluations)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Element-wise float64 sum of host values over all ranks. Collective."""
        return self.session.host.sum(values)

    def preserve_random_state(self) -> contextlib.AbstractContextManager[None]:
        """A context after which all random generators are as they were before."""
        from arctic_like.engine.random_state import preserved

        return preserved()

    def request_stop(self, reason: str = "callback") -> None:
        """Ask for the run to end before the next step; one rank is enough, all agree."""
        self.session.requested = reason

    def state_dict(self) -> dict[str, Any]:
        """What a subclass wants back after a resume, beside models and counters: plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def last_values(self) -> dict[str, Any]:
        """What a checkpoint keeps of the metrics: the last and best values and when was evaluated."""
        return {
            "metrics": self._metrics,
            "best": self._best,
            "evaluations": self._evaluations,
            "evaluated_at": self._last_evaluation,
            "evaluations_made": self._evaluations_made,
        }

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's `run.json`: counters and last values."""
        self.progress = Progress(**{**saved["progress"], "stopped": ""})
        self._metrics = dict(saved["last"]["metrics"])
        self._best = dict(saved["last"]["best"])
        self._evaluations = {k: tuple(v) for k, v in saved["last"]["evaluations"].items()}
        self._last_evaluation = saved["last"]["evaluated_at"]
        self._evaluations_made = saved["last"]["evaluations_made"]
        self._stream = None

    @property
    def is_done(self) -> bool:
        """Whether no further step follows."""
        return bool(self.progress.stopped) or self.global_step >= self.training_horizon

    # The loop's own business ----------------------------------------------------------------------

    def _weigh(self, batch: StepBatch) -> list[WeightedBatch]:
        """Weights of this rank, total over all ranks, and whether anyone wants to stop: one exchange."""
        weights = [0.0 if m.idle else float(self.weight(m.data)) for m in batch.micro_batches]
        wanted = self._wants_to_stop()
        total, *asked = self.session.host.sum(
            [sum(weights), *(float(reason == wanted) for reason in STOP_REASONS)]
        )
        for reason, count in zip(STOP_REASONS, asked, strict=True):
            if count:
                self._stop(reason)
                return []
        if total <= 0:
            raise RunError(
                f"step {self.global_step + 1} has nothing to train: the weight of its "
                f"{len(batch.global_batch.samples)} samples is {total} "
                f"({self._name_samples(batch)}); check weight(batch)"
            )
        self.session.step_weight = total
        share = self.world.size / total
        return [
            WeightedBatch(m.data, m.samples, w, w * share)
            for m, w in zip(batch.micro_batches, weights, strict=True)
        ]

    def _wants_to_stop(self) -> str:
        session = self.session
        if not session.requested and self.world.is_main:
            session.requested = session.external_stop(self.config.kill_switch_path)
        return session.requested

    def _stop(self, reason: str) -> None:
        self.progress.stopped = reason
        self.emit("on_stop_requested", reason)
        if reason in ("interrupt", "terminate"):
            self.emit("on_interrupt")

    def _loss(self, batch: dict[str, Tensor], weight: float) -> Loss:
        """The one place where a scalar or a `Loss` becomes one form."""
        loss = self.loss(batch)
        if not isinstance(loss, Loss):
            loss = Loss(loss)
        elif loss.weight is not None and weight and float(loss.weight) != weight:
            raise RunError(
                f"{type(self).__name__}.loss says its mean is over {loss.weight}, but weight(batch) is "
                f"{weight}; the gradient would be scaled wrongly. Let both count the same"
            )
        if loss.mean.ndim != 0:
            raise RunError(
                f"{type(self).__name__}.loss returned a tensor of shape {tuple(loss.mean.shape)}; "
                "it must be the scalar mean over weight(batch)"
            )
        return loss

    def _after_step(self, batch: StepBatch) -> None:
        """Counters, line, evaluation, epoch's end and checkpoint of the step that was just done."""
        equipment, plan = self.equipment, self.equipment.plan
        self.progress.global_step += 1
        self.progress.position += len(batch.global_batch.samples)
        self._steps_this_run += 1
        rates = [group["lr"] for group in equipment.learners["model"].optimizer.param_groups]
        equipment.learners["model"].scheduler.step()
        self.emit("on_step_end")
        epoch_over = self.progress.position % plan.samples_per_epoch == 0
        logs = self.config.train_log_iter_interval
        if self._due(logs, "log") or (logs and self.global_step == self.training_horizon):
            self._log_step(rates)
        with self._clock_stopped():
            if epoch_over:
                self.emit("on_epoch_end")
            if self._due(self.config.eval_interval, "evaluation"):
                self.evaluate()
            if epoch_over:
                self._log_epoch()
            self._exit_if_asked()
            if equipment.saver.due(self, epoch_over=epoch_over):
                self.checkpoint()

    def _due(self, interval: Any, name: str) -> bool:
        """Whether an interval of the recipe is due after this step; ranks agree on the clock."""
        if not interval:
            return False
        since = 0.0
        if interval.unit == "seconds":
            now = time.monotonic()
            last = self._last_times.setdefault(name, self.session.started)
            since = self.session.host.from_main(now - last)
        due = interval.due(
            self.global_step,
            steps_per_epoch=self.equipment.plan.batches_per_epoch,
            total_steps=self.training_horizon,
            seconds_since_last=since,
        )
        if due:
            self._last_times[name] = time.monotonic()
        return bool(due)

    def _exit_if_asked(self) -> None:
        config = self.config
        for limit, count in ((config.exit_iteration, self.global_step),
                             (config.exit_iteration_this_run, self._steps_this_run)):  # fmt: skip
            if limit and count >= limit and not self.is_done:
                self._stop("exit_iteration")

    def _log_step(self, rates: list[float]) -> None:
        """The train line. The only place in a step that waits for the device."""
        means = self.equipment.step_ledger.read()
        loss = means.values.pop("loss")
        norm = float(self.equipment.learners["model"].engine.grad_norm)
        steps = self.global_step - self._marks["line"]
        seconds = (time.perf_counter() - self._marks["step"]) / max(steps, 1)
        self._fail_if_not_finite(loss)
        self._fail_if_not_finite(norm, what="gradient norm")
        line = {
            "loss": loss,
            "learning_rate": rates[0],
            "grad_norm": norm,
            "tokens": int(self.session.step_weight),
            "samples_seen": self.progress.position,
            "step_time": seconds,
            "tokens_per_second": means.weight / max(seconds * steps, 1e-9),
            **means.values,
        }
        self.emit("on_log", line)
        self.log(line, kind="train")
        self._mark()

    def _log_epoch(self) -> None:
        means = self.equipment.epoch_ledger.read()
        loss = means.values["loss"]
        self._fail_if_not_finite(loss)
        self.log({"epoch_train_loss": loss}, kind="epoch")

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """What happens inside does not count into the step time of the next train line."""
        start = time.perf_counter()
        yield
        self._marks["step"] += time.perf_counter() - start

    def _mark(self) -> None:
        """Start the clock of the next train line."""
        self._marks = {"step": time.perf_counter(), "line": self.global_step}

    def _fail_if_not_finite_so_far(self) -> None:
        means = self.equipment.epoch_ledger.read(reset=False)
        if "loss" in means.values:
            self._fail_if_not_finite(means.values["loss"])

    def _fail_if_not_finite(self, value: float, *, what: str = "loss") -> None:
        """Raise NonFiniteError with step, samples and ways out; `value` is the same on all ranks."""
        if math.isfinite(value):
            return
        position = self._batch.global_batch.position if self._batch else -1
        here = self.global_step + (0 if position < self.progress.position else 1)
        step = (self.equipment.epoch_ledger.first_bad_step() if what == "loss" else None) or here
        samples = (
            f"; its samples: {self._name_samples(self._batch)}"
            if self._batch and step == here
            else ""
        )
        newest = self.equipment.saver.newest()
        kept = (
            f"The last good checkpoint is {newest}." if newest else "No checkpoint was saved yet."
        )
        raise NonFiniteError(
            f"the {what} of step {step} is {value}{samples}\n"
            f"    Nothing was saved after it. {kept}\n"
            "    Try a lower optimizer.learning_rate or a longer warm-up, look at these samples, "
            "or train in another model.dtype."
        )

    def _name_samples(self, batch: StepBatch) -> str:
        samples = self.equipment.loader.samples
        names = [samples.sample_id(int(i)) for i in batch.global_batch.samples[:8]]
        more = len(batch.global_batch.samples) - len(names)
        return ", ".join(names) + (f" and {more} more" if more > 0 else "")

    def _evaluate_set(self, name: str, batches: Iterator[MicroBatch]) -> dict[str, float]:
        from arctic_like.metrics.ledger import Ledger

        ledger = Ledger(device=self.device, host=self.session.host)
        for micro in batches:
            batch = self.to_device(micro.data)
            weight = 0.0 if micro.idle else float(self.weight(micro.data))
            self.emit("on_evaluate_batch_start", batch)
            loss = self._loss(batch, weight)
            self.emit("on_evaluate_batch_end", batch, loss)
            ledger.add(terms_of(loss, weight))
        means = ledger.read()
        prefix = "" if name in ("", "eval") else f"{name}/"
        return {f"eval/{prefix}{key}": value for key, value in means.values.items()}

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        import torch

        module = self.module
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad(), self.preserve_random_state():
                yield
        finally:
            module.train(was_training)

    def _finish(self) -> None:
        """The last evaluation and checkpoints; nothing where a resumed run had already done them."""
        progress = self.progress
        finished = not progress.stopped
        if finished and progress.finished:
            return
        if finished and self.config.eval_at_end and self._last_evaluation != self.global_step:
            self.evaluate()
        progress.finished = finished
        if not finished and self._last_save == self.global_step:
            return
        if self.equipment.saver.due(self, at_end=finished, at_stop=not finished):
            self.checkpoint()

    def _result(self) -> Result:
        reason = self.progress.stopped or "finished"
        saver = self.equipment.saver
        return Result(
            steps=self.global_step,
            stop_reason=reason,
            output_dir=self.session.directory.path,
            metrics=dict(self._metrics),
            best=dict(self._best),
            checkpoint=saver.newest(),
            exports=tuple(saver.exports),
            signal={"interrupt": 2, "terminate": 15}.get(reason, 0),
        )


def _again_and_again(stream: Iterator[Any]) -> Iterator[Any]:
    first = next(stream)
    while True:
        yield first
