"""`embedding`: texts that belong together, for models that make vectors of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from arctic_like.config.values import HumanInt
from arctic_like.data.base import DataConfig, LongSamples, SourceConfig
from arctic_like.data.factory import TokenDataFactory
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arctic_like.data.encode import Encoder
    from arctic_like.data.prepare import Cut, Prepared, SourceDocuments
    from arctic_like.data.tokenise import Store


class EmbeddingDataConfig(DataConfig):
    """The recipe's `data:` for texts that belong together: an anchor, its positive, hard negatives."""

    type: str = "embedding"

    pack_samples: bool = False
    """Always off: every text goes through the model in a row of its own."""

    negatives: HumanInt = Field(default=0, ge=0)
    """The most hard negatives of a row (`negative`, a text, or `negatives`, a list). Rows may have fewer."""

    query_prefix: str = ""
    """Instruction before every anchor: `"query: "`. It is a part of the text."""

    passage_prefix: str = ""
    """Instruction before every positive and negative: `"passage: "`."""


class EmbeddingDataFactory(TokenDataFactory):
    """Units of texts; each text keeps the special tokens that its tokenizer puts around it."""

    name = "embedding"
    config_type = EmbeddingDataConfig
    config: EmbeddingDataConfig
    # the start of a passage says what it is about, and special tokens at its end stay
    default_long: ClassVar[LongSamples] = "truncate_right"

    def problems(self) -> list[Problem]:
        """Settings that do not go with texts that each stand alone."""
        return [
            *super().problems(),
            *whole_texts(self.config, "embeddings", "a part of a text does not belong to its pair"),
        ]

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.pairs_of_texts_encoder import UnitEncoder

        config = self.config
        return UnitEncoder(
            tokenizer, source, query_prefix=config.query_prefix,
            passage_prefix=config.passage_prefix, negatives=config.negatives,
        )  # fmt: skip

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        config = self.config
        return {
            "query": config.query_prefix,
            "passage": config.passage_prefix,
            "negatives": config.negatives,
        }

    def samples(
        self, sources: list[SourceDocuments], cut: Cut, *, store: Store,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> Prepared:  # fmt: skip
        from arctic_like.data.pairs_of_texts_samples import unit_samples

        found = unit_samples(sources, cut, store=store, share=share)
        prefixes = {
            "query_prefix": self.config.query_prefix,
            "passage_prefix": self.config.passage_prefix,
        }
        found.facts = {**found.facts, **prefixes}
        return found

    def _sets(self, entries: Any, cut: Cut, store: Store) -> dict[str, Prepared]:
        # here and not in `build`, whose parameters say what a run has to bring
        if problems := self.problems():
            raise RecipeError(problems)
        return super()._sets(entries, cut, store)


def whole_texts(config: DataConfig, what: str, why: str) -> list[Problem]:
    """What a recipe may not say of texts that each go through the model in a row of their own."""
    found = []
    for name in ("pack_samples", "always_max_length", "repeat_to_pack_max_length"):
        if getattr(config, name):
            found.append(
                Problem(
                    f"is on, but every text of {what} is a row of its own",
                    place=f"data.{name}", hint="leave it out; set micro_batch_size",
                )
            )  # fmt: skip
    if config.streaming:
        found.append(
            Problem(
                f"is on, but is not built for {what}", place="data.streaming", hint="leave it out"
            )
        )
    listed = {"data.sources": config.sources}
    listed |= {f"data.{path}": one for path, one in config.held_out().items()}
    stated = {"data.long_samples": config.long_samples}
    for path, sources in listed.items():
        for number, source in enumerate(sources):
            stated[f"{path}.{number}.long_samples"] = source.long_samples
            if source.tokenised:
                found.append(
                    Problem(
                        f"holds tokens, but {what} are read from texts",
                        place=f"{path}.{number}", hint="give the texts",
                    )
                )  # fmt: skip
    for place, policy in stated.items():
        if policy in ("split", "truncate_left"):
            found.append(
                Problem(
                    f"is {policy}, but {why}", place=place,
                    hint="use truncate_right, drop or error",
                )
            )  # fmt: skip
    return found
