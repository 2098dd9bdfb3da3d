"""Event files for TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arctic_like.errors import Problem, RecipeError
from arctic_like.tracking.base import Tracker, TrackerConfig


class TensorBoardConfig(TrackerConfig):
    """Where event files go."""

    output_dir: str | None = None
    """Folder of the event files; `tensorboard/` inside the run directory unless given."""


class TensorBoardTracker(Tracker):
    """Writes event files. A resumed run hides the steps that it does again."""

    name = "tensorboard"
    config_type = TensorBoardConfig

    def start(
        self,
        *,
        run_name: str,
        recipe: dict[str, Any],
        output_dir: Path,
        total_steps: int | None,
        state: dict[str, Any],
    ) -> None:
        """Open a new event file; earlier ones of the run stay."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise RecipeError(
                Problem(
                    "needs the package tensorboard, which is not installed",
                    place="trackers",
                    hint="pip install 'arctic-like[tensorboard]', or leave the tracker out",
                )
            ) from None
        self._step = int(state.get("step", -1))
        folder = self.config.output_dir or output_dir / "tensorboard"
        # purge_step hides what the killed run wrote after the checkpoint.
        purge = self._step + 1 if state else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge)
        if not state:
            import yaml

            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            self.text(0, "recipe", f"```yaml\n{text}\n```")

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """One curve for each number."""
        self._step = max(self._step, step)
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, value: str) -> None:
        """Shown as markdown."""
        self._writer.add_text(name, value, step)

    def table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        """A table in markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        self.text(step, name, "\n".join("| " + " | ".join(map(_cell, x)) + " |" for x in lines))

    def image(self, step: int, name: str, array: Any) -> None:
        """See `Tracker.image` for shapes."""
        self._writer.add_image(name, array, step, dataformats="HW" if array.ndim == 2 else "HWC")

    def histogram(
        self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]
    ) -> None:
        """Under histograms and distributions; sums are taken at the middles of the bins."""
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self._writer.add_histogram_raw(
            name, min=edges[0], max=edges[-1], num=sum(counts), global_step=step,
            sum=sum(m * c for m, c in zip(middles, counts, strict=True)),
            sum_squares=sum(m * m * c for m, c in zip(middles, counts, strict=True)),
            bucket_limits=list(edges[1:]), bucket_counts=list(counts),
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The last step that was written."""
        self._writer.flush()
        return {"step": self._step}

    def finish(self, exit_code: int) -> None:
        """Write what is left."""
        self._writer.close()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
