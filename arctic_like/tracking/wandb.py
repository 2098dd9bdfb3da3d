"""Weights & Biases. Its run resumes: the id is kept in each checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.tracking.base import Tracker, TrackerConfig


class WandbTrackerConfig(TrackerConfig):
    """Which run of which project. WANDB_MODE and the other variables of wandb hold as usual."""

    entity: str | None = None
    """The user or team that owns the run."""

    project: str | None = "arctic-training"
    """The project that the run joins."""

    name: str | None = None
    """The run's name; the run directory's unless given."""


class WandbTracker(Tracker):
    """Sends the run's numbers; wandb writes and sends in a process of its own."""

    name = "wandb"
    config_type = WandbTrackerConfig

    def start(
        self,
        *,
        run_name: str,
        recipe: dict[str, Any],
        output_dir: Path,
        total_steps: int | None,
        state: dict[str, Any],
    ) -> None:
        """Start a run, or go on with the one of `state["id"]`."""
        self._wandb = _import()
        _check_key(self._wandb)
        self._run: Any = self._wandb.init(
            entity=self.config.entity, project=self.config.project,
            name=self.config.name or run_name, config=recipe, dir=str(output_dir),
            id=state.get("id"), resume="allow",
        )  # fmt: skip
        # Numbers are plotted over our step. wandb's own may not go back, as a resume does.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One curve for each number."""
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, value: str) -> None:
        """As a table of one cell, which is how wandb shows texts."""
        self.table(step, name, ["text"], [[value]])

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """As a wandb.Table."""
        data = [list(row) for row in rows]
        table = self._wandb.Table(columns=list(columns), data=data)
        self._run.log({"step": step, name: table})

    def image(self, step: int, name: str, array: Any) -> None:
        """As a wandb.Image."""
        self._run.log({"step": step, name: self._wandb.Image(array)})

    def histogram(
        self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]
    ) -> None:
        """As a wandb.Histogram."""
        histogram = self._wandb.Histogram(np_histogram=(list(counts), list(edges)))
        self._run.log({"step": step, name: histogram})

    def state(self) -> dict[str, Any]:
        """The run's id."""
        return {"id": self._run.id}

    def finish(self, exit_code: int) -> None:
        """Wait until everything is sent."""
        self._run.finish(exit_code=exit_code)


def _import() -> Any:
    try:
        import wandb
    except ImportError:
        raise RecipeError(
            Problem(
                "needs the package wandb, which is not installed",
                place="wandb",
                hint="pip install 'arctic-like[wandb]', or leave wandb out",
            )
        ) from None
    return wandb


def _check_key(wandb: Any) -> None:
    """Refuse a run that would ask for a key: a launched process cannot be answered.

    Raises RecipeError.
    """
    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    # The key may also stand in .netrc or in wandb's settings.
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or wandb.api.api_key:
        return
    raise RecipeError(
        Problem(
            "has no key to send with",
            place="wandb",
            hint="run `wandb login` once, set WANDB_API_KEY, or WANDB_MODE=offline to send later",
        )
    )
