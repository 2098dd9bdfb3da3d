"""Spikes of the loss or of the gradient norm, and values that are not finite: warn, stop, or go back.

A value x of the train lines is a spike if it is far above those of the last `window` lines w:

    zscore:  x - median(w) > threshold · max(1.4826 · median|w - median(w)|, 0.01 · |median(w)|)
    ema:     x > threshold · e,  where e ← 0.9 e + 0.1 min(x, threshold · e) over the lines; for e > 0

The first is the modified z-score of Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993); its
floor keeps a window of equal values from making a spike of any change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.errors import NonFiniteError, Problem, RecipeError, RunError

if TYPE_CHECKING:
    from arctic_like.trainer.base import Trainer

SCALE = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
FLOOR = 0.01
DECAY = 0.9


class SpikeConfig(CallbackConfig):
    """What a spike is, and what to do about it."""

    type: str = "spike_detection"

    watch: list[str] = Field(default=["loss", "grad_norm"], min_length=1)
    """Values of the train lines. They are looked at where a line is written
    (`train_log_iter_interval`): reading them there costs no further wait for the device."""

    method: Literal["zscore", "ema"] = "zscore"
    """`zscore`: distance to the median of the window in robust standard deviations. `ema`: ratio to an
    exponential moving average, for positive values."""

    threshold: HumanFloat = Field(default=8.0, gt=0)
    """How far is too far: standard deviations, or the ratio."""

    window: HumanInt = Field(default=50, ge=3)
    """Lines that a value is compared with."""

    min_lines: HumanInt = Field(default=20, ge=2)
    """No spikes before so many lines: in the beginning everything changes."""

    action: Literal["warn", "stop", "rewind"] = "warn"
    """`warn`: say so. `stop`: end the run, with a checkpoint. `rewind`: go back to the last checkpoint before
    it and pass over the global batches since the line before (after a loss that is not finite: over the
    batch of that step); these are remembered through resumes."""

    max_rewinds: HumanInt = Field(default=3, ge=1)
    """How often to go back to one checkpoint; then the run ends with an error."""


class SpikeDetection(Callback):
    """`type: spike_detection`. Sees every train line on all ranks alike, rank zero's values.

    Where it rewinds, a line every step names the batch exactly; with a line every n steps, all n batches
    are passed over. A loss that is not finite ends the run with an error unless it rewinds.
    """

    name = "spike_detection"
    config_type: ClassVar[type[CallbackConfig]] = SpikeConfig
    config: SpikeConfig

    def __init__(self, config: SpikeConfig) -> None:
        super().__init__(config)
        self._windows: dict[str, list[float]] = {name: [] for name in config.watch}
        self._averages: dict[str, float] = {}
        self._lines = 0
        self._since: list[tuple[int, int]] = []
        """(step, position) of the global batches since the last line."""

    def on_setup_end(self, trainer: Trainer) -> None:
        """Refuse what cannot work."""
        config, problems = trainer.config, []
        if not config.train_log_iter_interval:
            problems.append(
                Problem("is off, and spike_detection looks at train lines",
                        place="train_log_iter_interval", hint="set it to 1 or more")
            )  # fmt: skip
        if self.config.action == "rewind":
            if trainer.equipment.saver.resumable_engine() is None:
                problems.append(
                    Problem("has no engine to go back to, and spike_detection rewinds",
                            place="checkpoint", hint="add {type: deepspeed, save_every_n_steps: …}")
                )  # fmt: skip
            if config.overfit_first_batch:
                problems.append(
                    Problem("trains on one batch, and spike_detection would pass over it",
                            place="overfit_first_batch", hint="take action: warn or stop")
                )  # fmt: skip
        if problems:
            raise RecipeError(problems)

    def on_step_start(self, trainer: Trainer) -> None:
        """Remember which batch this step has."""
        assert trainer.batch is not None
        self._since.append((trainer.global_step + 1, trainer.batch.global_batch.position))

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        """Compare this line with those before."""
        mine = {n: float(values[n]) for n in self.config.watch if n in values}
        have = ", ".join(values)
        line: dict[str, float]
        line, have = trainer.session.host.from_main((mine, have))
        self._check_names(line, have)
        found = [self._describe(name, value) for name, value in line.items()]
        reasons = [reason for reason in found if reason]
        if reasons and self._lines >= self.config.min_lines:
            self._act(trainer, f"spike at step {trainer.global_step}: {'; '.join(reasons)}")
        for name, value in line.items():
            self._take_in(name, value)
        self._lines += 1
        self._since = []

    def on_non_finite(self, trainer: Trainer, error: NonFiniteError) -> bool:
        """Go back rather than end, where the recipe says so."""
        if self.config.action != "rewind":
            return False
        exact = [position for step, position in self._since if step == error.step]
        skip = exact or [position for _, position in self._since]
        first = error.step if exact or not self._since else self._since[0][0]
        self._since = []
        return trainer.request_rewind(
            before=first, skip=skip, reason=str(error).splitlines()[0], most=self.config.max_rewinds
        )

    def _check_names(self, line: dict[str, float], have: str) -> None:
        missing = [name for name in self.config.watch if name not in line]
        if missing and not self._lines and self.config.given("watch"):
            raise RunError(
                f"spike_detection watches {', '.join(missing)}, but a train line has {have}\n"
                "    name some of these in its `watch`"
            )

    def _act(self, trainer: Trainer, reason: str) -> None:
        from loguru import logger

        action = self.config.action
        if action == "rewind":
            before = self._since[0][0] if self._since else trainer.global_step
            skip = [position for _, position in self._since]
            most = self.config.max_rewinds
            if trainer.request_rewind(before=before, skip=skip, reason=reason, most=most):
                return
            reason += "; there is no checkpoint before it to go back to"
        elif action == "stop":
            trainer.request_stop("spike")
        if trainer.world.is_main:
            logger.warning(reason)

    def _describe(self, name: str, value: float) -> str:
        """What makes a value a spike; empty if it is none."""
        threshold = self.config.threshold
        if not math.isfinite(value):
            return f"{name} is {value}"
        if self.config.method == "ema":
            average = self._averages.get(name, 0.0)
            if not 0 < average < value / threshold:
                return ""
            return f"{name} is {value:.6g}, {value / average:.3g} times its moving average"
        score = robust_score(value, self._windows[name])
        if score <= threshold:
            return ""
        return f"{name} is {value:.6g}, {score:.3g} robust standard deviations above its median"

    def _take_in(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            return
        window = self._windows[name]
        window.append(value)
        del window[: -self.config.window]
        average = self._averages.get(name)
        if average is None:
            self._averages[name] = value
        else:
            bounded = min(value, self.config.threshold * average) if average > 0 else value
            self._averages[name] = DECAY * average + (1 - DECAY) * bounded

    def state_dict(self) -> dict[str, Any]:
        """Windows, averages, and the batches since the last line."""
        return {"windows": {n: list(w) for n, w in self._windows.items()},
                "averages": dict(self._averages), "lines": self._lines,
                "since": list(self._since)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; values that are watched no longer are left out."""
        have = state["windows"]
        self._windows = {name: list(have.get(name, [])) for name in self.config.watch}
        self._averages = {n: a for n, a in state["averages"].items() if n in self._windows}
        self._lines = state["lines"]
        self._since = [(int(step), int(position)) for step, position in state["since"]]


def robust_score(value: float, window: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the window's median; 0 for an empty one."""
    if not window:
        return 0.0
    middle = median(window)
    deviation = SCALE * median(abs(one - middle) for one in window)
    scale = max(deviation, FLOOR * abs(middle))
    distance = value - middle
    if scale == 0:
        return math.inf if distance > 0 else 0.0
    return distance / scale
