"""Which learning rate to take: a short training at rising rates, of which nothing remains but a table.

Smith 2017, "Cyclical learning rates for training neural networks", section 3.3.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import wrong
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import NonFiniteError, Problem, RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from arctic_like.trainer.base import Trainer


class LRFinderConfig(CallbackConfig):
    """`type: lr_finder`."""

    type: str = "lr_finder"

    start: Annotated[HumanFloat, Field(gt=0, allow_inf_nan=False)] = 1e-7
    """The first learning rate."""

    end: Annotated[HumanFloat, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The last one, unless the loss diverges before."""

    steps: HumanInt = Field(default=100, ge=5)
    """Optimizer steps from the first rate to the last; each is the same factor above the one before."""

    smoothing: Annotated[HumanFloat, Field(ge=0, lt=1)] = 0.9
    """Of the loss: share of the mean so far in the next one (bias-corrected)."""

    diverged_at: Annotated[HumanFloat, Field(gt=1)] = 4.0
    """End early when the smoothed loss is so many times the lowest one."""

    then: Literal["stop", "continue", "use"] = "stop"
    """Afterwards end the run, train as the recipe says, or train with the suggested rate (the schedule and
    rates of groups keep their proportions)."""

    @model_validator(mode="after")
    def _rising(self) -> LRFinderConfig:
        if self.end <= self.start:
            raise wrong(
                f"is {self.end}, not above start ({self.start})", place="end", hint="swap them"
            )
        return self


class LRFinder(Callback):
    """`type: lr_finder`: before the first step, losses over exponentially rising learning rates; writes
    `lr_finder.csv` (and `.png` where matplotlib is installed) and says where the loss fell fastest.

    Weights, optimizer, generators, place in the data and all else are exactly as before afterwards.
    """

    name = "lr_finder"
    config_type = LRFinderConfig
    config: LRFinderConfig

    def __init__(self, config: LRFinderConfig) -> None:
        super().__init__(config)
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.suggestion: float | None = None

    def on_setup_end(self, trainer: Trainer) -> None:
        """Raises RecipeError where there is not one optimizer to try rates with."""
        trained = [name for name, learner in trainer.learners.items() if not learner.frozen]
        if len(trained) != 1:
            raise RecipeError(
                Problem(
                    f"tries rates of one optimizer, and this run trains {', '.join(trained)}",
                    "callbacks.lr_finder", "take it out of `callbacks`",
                )
            )  # fmt: skip

    def on_train_start(self, trainer: Trainer) -> None:
        """Try, go back, and say what was found. Collective."""
        if trainer.global_step:
            return  # a resumed run has its rate
        state = trainer.state_dict()
        equipment, learner = trainer.equipment, trainer.learner()
        groups = learner.optimizer.param_groups
        before = [float(group["lr"]) for group in groups]
        ledgers = equipment.step_ledger, equipment.epoch_ledger
        from arctic_like.metrics.ledger import Ledger

        host = trainer.session.host
        equipment.step_ledger = Ledger(device=trainer.device, host=host)
        equipment.epoch_ledger = Ledger(device=trainer.device, host=host)
        try:
            self._sweep(trainer, [float(group.get("initial_lr", group["lr"])) for group in groups])
        finally:
            equipment.step_ledger, equipment.epoch_ledger = ledgers
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate
            trainer.load_state_dict(state)
        self.suggestion = steepest(self.rates, smoothed(self.losses, self.config.smoothing))
        self._tell(trainer)
        if self.config.then == "stop":
            trainer.request_stop("lr_finder")
        elif self.config.then == "use" and self.suggestion is not None:
            use(learner, self.suggestion)

    def _sweep(self, trainer: Trainer, stated: list[float]) -> None:
        config, top = self.config, max(stated)
        self.rates, self.losses = [], []
        factor = (config.end / config.start) ** (1 / (config.steps - 1))
        for number in range(config.steps):
            rate = config.start * factor**number
            groups = trainer.learner().optimizer.param_groups
            for group, own in zip(groups, stated, strict=True):
                group["lr"] = rate * (own / top if top else 1.0)
            batch = next(trainer.train_batches)
            micro_batches = trainer._weigh(batch)
            if trainer.progress.stopped:
                return
            trainer.batch = batch
            try:
                trainer.step(micro_batches)
            except NonFiniteError:
                return
            loss = trainer.equipment.step_ledger.read().values.get("loss", math.nan)
            trainer.progress.global_step += 1
            trainer.progress.position += len(batch.global_batch.samples)
            if not math.isfinite(loss):
                return
            self.rates.append(rate)
            self.losses.append(loss)
            smooth = smoothed(self.losses, config.smoothing)
            if smooth[-1] > config.diverged_at * min(smooth):
                return

    def _tell(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        from loguru import logger

        from arctic_like.rundir import write_atomically

        folder = trainer.session.directory.path
        smooth = smoothed(self.losses, self.config.smoothing)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["learning_rate", "loss", "smoothed_loss"])
        rows.writerows(zip(self.rates, self.losses, smooth, strict=True))
        write_atomically(folder / "lr_finder.csv", text.getvalue())
        if importlib.util.find_spec("matplotlib") is not None and self.rates:
            draw(self.rates, self.losses, smooth, self.suggestion, folder / "lr_finder.png")
        if self.suggestion is None:
            logger.warning(
                f"lr_finder suggests nothing: the loss did not fall in {len(self.rates)} steps; "
                f"the table is {folder / 'lr_finder.csv'}"
            )
        else:
            logger.info(
                f"lr_finder: the loss falls fastest at a learning rate of {self.suggestion:.2e}; the "
                f"table is {folder / 'lr_finder.csv'}"
            )


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Exponential mean of what was so far, with Adam's correction of the bias to zero."""
    mean, found = 0.0, []
    for number, value in enumerate(values, 1):
        mean = share * mean + (1 - share) * value
        found.append(mean / (1 - share**number))
    return found


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The rate at which the loss falls fastest over the logarithm of the rate, before its lowest point; None
    where it falls nowhere, or there are fewer than five."""
    if len(losses) < 5:
        return None
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = {
        i: (losses[i + 1] - losses[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(1, min(lowest + 1, len(losses) - 1))
    }
    best = min(slopes, key=lambda i: slopes[i], default=0)
    return rates[best] if slopes and slopes[best] < 0 else None


def use(learner: Any, rate: float) -> None:
    """Scale a learner's schedules as if the recipe had said this rate. Before the first step."""
    groups = learner.optimizer.param_groups
    state = learner.scheduler.state_dict()
    ratio = rate / max(state["stated_rates"])
    before = [float(group["lr"]) for group in groups]
    # what a resume does where the recipe's rate was changed
    state["stated_rates"] = [stated / ratio for stated in state["stated_rates"]]
    learner.scheduler.load_state_dict(state)
    for group, own in zip(groups, before, strict=True):
        group["lr"] = own * ratio


def draw(
    rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float],
    suggestion: float | None, path: Path,
) -> None:  # fmt: skip
    """Losses over rates as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="lightgray", label="loss")
    axes.plot(rates, smooth, label="smoothed")
    if suggestion is not None:
        axes.axvline(suggestion, linestyle=":", color="black", label=f"{suggestion:.2e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)
