"""The data factories of preferences: pairs (`dpo`), rankings of several answers (`ranking`), and answers that
are each judged by themselves (`kto`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

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


class PreferenceDataConfig(DataConfig):
    """What the recipe's `data:` of preferences has in common."""

    max_prompt_length: HumanInt = Field(default=4096, ge=1)
    """Longest prompt in tokens; a longer one is cut, and counted. `max_length` bounds each answer
    together with its prompt."""

    dpo_prompt_truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """Which end of a long prompt is kept."""


class DPODataConfig(PreferenceDataConfig):
    """The recipe's `data:` for preferences: a prompt with a chosen and a rejected answer."""

    type: str = "dpo"

    margin: bool = False
    """Every row also has a number `margin`, by how much its chosen answer was judged better; `type: reward`
    asks for at least that difference."""


class RankingDataConfig(PreferenceDataConfig):
    """The recipe's `data:` for rankings: a prompt with several answers in order of preference."""

    type: str = "ranking"

    answers: HumanInt = Field(default=4, ge=2)
    """How many answers every row has."""


class KTODataConfig(PreferenceDataConfig):
    """The recipe's `data:` for answers that are each judged for themselves."""

    type: str = "kto"

    kl_answers: bool = False
    """Behind each answer its prompt with the answer of another row, by which `loss: kto` estimates the
    divergence from the reference; it sets this itself."""


class _PreferenceDataFactory(TokenDataFactory):
    """Answers with their prompts, which are never trained."""

    config: PreferenceDataConfig
    # an answer that was cut is not the one that was judged
    default_long: ClassVar[LongSamples] = "drop"
    answers_of_a_row: ClassVar[int]

    @property
    def documents(self) -> int:
        """Documents of a row, which stay together."""
        return self.answers_of_a_row

    @property
    def mismatched(self) -> bool:
        """Whether a prompt with another row's answer stands behind each answer."""
        return False

    def problems(self) -> list[Problem]:
        config = self.config
        found = [*super().problems()]
        if config.always_max_length:
            found.append(
                Problem(
                    "is on, but the answers of preferences are not cut to fill samples",
                    place="data.always_max_length",
                    hint="leave it out; pack_samples fills samples with whole ones",
                )
            )
        if config.repeat_to_pack_max_length:
            found.append(
                Problem(
                    "is on, but pairs and judged answers are not repeated",
                    place="data.repeat_to_pack_max_length",
                    hint="leave it out, or raise epochs",
                )
            )
        found += self._of_sources()
        for place, value in (("train_on", config.train_on), ("mask_inputs", config.mask_inputs)):
            if value not in (None, True, "assistant"):
                found.append(_trains_prompts(f"data.{place}", value))
        if config.long_samples == "split":
            found.append(_splits("data.long_samples"))
        return found

    def _of_sources(self) -> list[Problem]:
        listed = {"data.sources": self.config.sources}
        listed |= {f"data.{path}": one for path, one in self.config.held_out().items()}
        found = []
        for path, sources in listed.items():
            for number, source in enumerate(sources):
                place = f"{path}.{number}"
                if source.train_on not in (None, "assistant"):
                    found.append(_trains_prompts(f"{place}.train_on", source.train_on))
                if source.long_samples == "split":
                    found.append(_splits(f"{place}.long_samples"))
                if not source.process:
                    found.append(
                        Problem(
                            "is off, but preferences are not read as tokens",
                            place=f"{place}.process",
                            hint="give the answers as text or as messages",
                        )
                    )
        return found

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        from arctic_like.data.encoders import MaskRules

        return {
            **MaskRules.of(self.config, source).key(),
            "max_prompt_length": self.config.max_prompt_length,
            "truncation": self.config.dpo_prompt_truncation_mode,
        }

    def samples(
        self,
        sources: list[SourceDocuments],
        cut: Cut,
        *,
        store: Store,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> Prepared:
        from arctic_like.data.preference_samples import preference_samples

        return preference_samples(
            sources, cut, documents=self.documents, store=store, share=share,
            mismatched=self.mismatched,
        )  # fmt: skip

    def _sets(self, entries: Any, cut: Cut, store: Store) -> dict[str, Prepared]:
        # here and not in `build`, whose parameters say what a run has to bring
        if problems := self.problems():
            raise RecipeError(problems)
        return super()._sets(entries, cut, store)

    def _options(self, source: SourceConfig) -> dict[str, Any]:
        from arctic_like.data.encoders import MaskRules

        return {
            "rules": MaskRules.of(self.config, source),
            "max_prompt_length": self.config.max_prompt_length,
            "truncation": self.config.dpo_prompt_truncation_mode,
        }


class DPODataFactory(_PreferenceDataFactory):
    """Pairs of answers to one prompt; packed, a sample holds whole pairs."""

    name = "dpo"
    config_type = DPODataConfig
    config: DPODataConfig
    answers_of_a_row = 2

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.preference_encoders import PairEncoder

        return PairEncoder(
            tokenizer, source, **self._options(source), with_margin=self.config.margin
        )

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        return {**super().shape(source), **({"margin": True} if self.config.margin else {})}


class RankingDataFactory(_PreferenceDataFactory):
    """Several answers to one prompt, the best first; packed, a sample holds whole rankings."""

    name = "ranking"
    config_type = RankingDataConfig
    config: RankingDataConfig

    @property
    def documents(self) -> int:
        """See `_PreferenceDataFactory.documents`."""
        return self.config.answers

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.preference_encoders import RankingEncoder

        return RankingEncoder(tokenizer, source, **self._options(source), count=self.config.answers)

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        return {**super().shape(source), "answers": self.config.answers}


class KTODataFactory(_PreferenceDataFactory):
    """Answers that are each wanted or not (`label`)."""

    name = "kto"
    config_type = KTODataConfig
    config: KTODataConfig
    answers_of_a_row = 1

    @property
    def mismatched(self) -> bool:
        """See `KTODataConfig.kl_answers`."""
        return self.config.kl_answers

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.preference_encoders import UnpairedEncoder

        return UnpairedEncoder(tokenizer, source, **self._options(source))

    def _sets(self, entries: Any, cut: Cut, store: Store) -> dict[str, Prepared]:
        sets = super()._sets(entries, cut, store)
        facts = sets["train"].facts if "train" in sets else {}
        wanted, unwanted = facts.get("desirable", 0), facts.get("undesirable", 0)
        if wanted + unwanted and not (wanted and unwanted):
            which = "wanted" if wanted else "unwanted"
            raise RecipeError(
                Problem(
                    f"holds {wanted + unwanted:,} answers that are all "
                    f"{which}; what is learned is how the two kinds differ",
                    place="data.sources",
                    hint="add answers with the other `label`, or train with type: sft",
                )
            )
        return sets


def _trains_prompts(place: str, value: Any) -> Problem:
    return Problem(
        f"is {str(value).lower()}, but the prompts of preferences are never trained",
        place=place,
        hint="leave it out",
    )


def _splits(place: str) -> Problem:
    return Problem(
        "is split, but a part of an answer was never judged",
        place=place,
        hint="use drop, truncate_left, truncate_right or error",
    )
