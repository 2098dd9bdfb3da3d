"""`stepwise`: solutions whose steps are each marked right or wrong, for process rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from arctic_like.data.base import DataConfig, SourceConfig
from arctic_like.data.factory import TokenDataFactory
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arctic_like.data.encode import Encoder
    from arctic_like.data.prepare import Cut, Prepared, SourceDocuments
    from arctic_like.data.tokenise import Store


class StepwiseDataConfig(DataConfig):
    """The recipe's `data:` for solutions whose steps are marked."""

    type: str = "stepwise"

    step_separator: str | None = Field(default=None, min_length=1)
    """What stands behind every step, a line break unless given; its last token is where the step is
    judged."""

    train_on_last_step_only: bool = False
    """Train the mark of a solution's last step alone."""


class StepwiseDataFactory(TokenDataFactory):
    """Solutions in steps; the label of a step, 1 where it is right and 0 where not, at its last token."""

    name = "stepwise"
    config_type = StepwiseDataConfig
    config: StepwiseDataConfig
    # what was cut from the end had marks
    default_long = "drop"

    @property
    def separator(self) -> str:
        """What stands behind every step."""
        return self.config.step_separator or "\n"

    def problems(self) -> list[Problem]:
        """Settings that do not go with steps."""
        found = [*super().problems()]
        listed = {"data.sources": self.config.sources}
        listed |= {f"data.{path}": one for path, one in self.config.held_out().items()}
        stated = {"data": self.config.long_samples}
        for path, sources in listed.items():
            for number, source in enumerate(sources):
                stated[f"{path}.{number}"] = source.long_samples
        for place, policy in stated.items():
            if policy in ("split", "truncate_left"):
                found.append(
                    Problem(
                        f"is {policy}, but steps are judged by the prompt before them",
                        place=f"{place}.long_samples", hint="use drop, truncate_right or error",
                    )
                )  # fmt: skip
        return found

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.step_encoder import StepEncoder

        return StepEncoder(
            tokenizer, source, separator=self.separator,
            last_only=self.config.train_on_last_step_only,
        )  # fmt: skip

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        return {
            "separator": self.separator,
            "last_only": self.config.train_on_last_step_only,
        }

    def samples(
        self, sources: list[SourceDocuments], cut: Cut, *, store: Store,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> Prepared:  # fmt: skip
        from arctic_like.data.prepare import Prepared
        from arctic_like.data.step_encoder import StepSamples

        found = super().samples(sources, cut, store=store, share=share)
        return Prepared(StepSamples(found.samples.folder, found.samples.documents), found.facts)

    def _sets(self, entries: Any, cut: Cut, store: Store) -> dict[str, Prepared]:
        # here and not in `build`, whose parameters say what a run has to bring
        if problems := self.problems():
            raise RecipeError(problems)
        return super()._sets(entries, cut, store)
