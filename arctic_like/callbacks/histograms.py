"""How weights and gradients are distributed, parameter by parameter, every so many steps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from arctic_like.callbacks.base import Callback, CallbackConfig
from arctic_like.config.base import wrong
from arctic_like.config.values import HumanInt
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from arctic_like.trainer.base import Trainer


class HistogramsConfig(CallbackConfig):
    """`type: histograms`."""

    type: str = "histograms"

    every_n_steps: HumanInt = Field(default=100, ge=1)
    """Look after every so many steps."""

    match: str = ""
    """Regular expression: which parameters, by name; all unless given."""

    weights: bool = True
    """Look at master weights (fp32), after the update."""

    gradients: bool = True
    """Look at gradients: unscaled, the mean over the global batch, before clipping."""

    bins: HumanInt = Field(default=64, ge=1)
    """Bins of a histogram, of equal width between the least and the greatest finite value."""

    metrics: bool = True
    """Write norm, mean, std, min and max to `metrics.jsonl` and all trackers
    (`gradients/<parameter>/norm`, …)."""

    learner: str = "model"
    """Which learner's parameters."""

    @field_validator("match", mode="after")
    @classmethod
    def _pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except re.error as error:
            raise wrong(f"is {match!r}, which is no regular expression: {error}") from None
        return match


@dataclass(frozen=True)
class Distribution:
    """What is said of one tensor. Moments and bounds are of the finite values.

    std: of the population. counts: (bins,) between edges: (bins + 1,); `non_finite` are in none.
    """

    norm: float
    mean: float
    std: float
    min: float
    max: float
    non_finite: int
    counts: list[int]
    edges: list[float]

    def numbers(self) -> dict[str, float]:
        """All that is one number; `non_finite` only where there are any."""
        found = {key: getattr(self, key) for key in ("norm", "mean", "std", "min", "max")}
        return found | ({"non_finite": self.non_finite} if self.non_finite else {})


class Histograms(Callback):
    """`type: histograms`: per parameter norm, mean, std, min and max, and a histogram for trackers that show
    such (tensorboard, wandb). At every ZeRO stage; one parameter is whole at a time.
    """

    name = "histograms"
    config_type = HistogramsConfig
    config: HistogramsConfig

    def __init__(self, config: HistogramsConfig) -> None:
        super().__init__(config)
        self._found: dict[str, Distribution] = {}

    def on_setup_end(self, trainer: Trainer) -> None:
        """Raises RecipeError where the pattern matches nothing."""
        learner = trainer.learner(self.config.learner)
        names = [] if learner.frozen else list(learner.engine.trained(frozen_too=True))
        if not any(re.search(self.config.match, name) for name in names):
            raise RecipeError(
                Problem(
                    f"is {self.config.match!r}, which no trained parameter's name contains",
                    "callbacks.histograms.match",
                    f"there are {', '.join(names[:6]) or 'none in this learner'}",
                )
            )

    def on_gradients_ready(self, trainer: Trainer) -> None:
        """Look at the gradients. Collective."""
        due = (trainer.global_step + 1) % self.config.every_n_steps == 0
        if due and self.config.gradients and trainer.updating == self.config.learner:
            engine = trainer.learner(self.config.learner).engine
            self._look(trainer, "gradients", engine.each_gradient())

    def on_step_end(self, trainer: Trainer) -> None:
        """Look at the weights, and show both. Collective."""
        if trainer.global_step % self.config.every_n_steps:
            return
        if self.config.weights:
            engine = trainer.learner(self.config.learner).engine
            self._look(trainer, "weights", engine.master_weights())
        recorder, step = trainer.equipment.recorder, trainer.global_step
        found, self._found = self._found, {}
        for name, one in found.items():
            for tracker in recorder.trackers:
                tracker.histogram(step, name, one.counts, one.edges)
        if self.config.metrics and found:
            line = {f"{n}/{key}": value for n, one in found.items()
                    for key, value in one.numbers().items()}  # fmt: skip
            epoch = trainer.progress.position / trainer.equipment.plan.samples_per_epoch
            # not trainer.log, which remembers every number for the end of the run
            recorder.write({"step": step, "epoch": epoch, **line}, kind="histograms")

    def _look(self, trainer: Trainer, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        prefix = kind if self.config.learner == "model" else f"{self.config.learner}/{kind}"
        for name, tensor in tensors:  # all ranks, to the end: each takes part in gathering
            if trainer.world.is_main and re.search(self.config.match, name):
                self._found[f"{prefix}/{name}"] = distribution(tensor, bins=self.config.bins)


def distribution(tensor: Tensor, *, bins: int) -> Distribution:
    """Of any floating tensor, in float64 where it sums. One of no finite value is all zeros."""
    import torch

    flat = tensor.detach().flatten()
    finite = flat[torch.isfinite(flat)]
    missing = flat.numel() - finite.numel()
    if not finite.numel():
        return Distribution(0.0, 0.0, 0.0, 0.0, 0.0, missing, [0] * bins, [0.0] * (bins + 1))
    wide = finite.double()
    low, high = float(wide.min()), float(wide.max())
    if low == high:  # as numpy and torch do for a single value
        edges_low, edges_high = low - 0.5, high + 0.5
    else:
        edges_low, edges_high = low, high
    counts = torch.histc(wide.cpu(), bins, edges_low, edges_high)
    edges = torch.linspace(edges_low, edges_high, bins + 1, dtype=torch.float64)
    return Distribution(
        float(wide.norm()), float(wide.mean()), float(wide.std(unbiased=False)), low, high, missing,
        [int(count) for count in counts.tolist()], edges.tolist(),
    )  # fmt: skip
