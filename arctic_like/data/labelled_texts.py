"""`classification`: texts with labels, or words with labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from arctic_like.config.base import wrong
from arctic_like.data.base import (
    BadRow,
    DataConfig,
    LongSamples,
    ReadRow,
    SourceConfig,
    make_source,
)
from arctic_like.data.factory import TokenDataFactory
from arctic_like.data.pairs_of_texts import whole_texts
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from arctic_like.data.encode import Encoder
    from arctic_like.data.prepare import Cut, Prepared, SourceDocuments
    from arctic_like.data.tokenise import Store

Task = Literal["sequence", "token"]


class ClassificationDataConfig(DataConfig):
    """The recipe's `data:` for texts with labels."""

    type: str = "classification"

    pack_samples: bool = False
    """Always off: every text goes through the model in a row of its own."""

    task: Task = "sequence"
    """What has a label: a `sequence` (columns `text` and `label`, or `labels`), or each word of one
    (`tokens` and `tags`). The trainer's `task` sets it."""

    multi_label: bool = False
    """Whether a text has any number of labels, a list. The trainer's `multi_label` sets it."""

    labels: list[str] = Field(default_factory=list)
    """The labels in the order of the model's outputs; those of the training rows, sorted, unless given."""

    @field_validator("labels", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return [label_name(one) for one in value] if isinstance(value, list) else value

    @field_validator("labels")
    @classmethod
    def _once(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise wrong("names a label twice", hint="name each once")
        return value


class ClassificationDataFactory(TokenDataFactory):
    """Texts, each with its label; the special tokens that its tokenizer puts around it stay."""

    name = "classification"
    config_type = ClassificationDataConfig
    config: ClassificationDataConfig
    # the start of a text mostly says what it is, and special tokens at its end stay
    default_long: ClassVar[LongSamples] = "truncate_right"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._names: list[str] = list(config.labels)

    def problems(self) -> list[Problem]:
        """Settings that do not go with texts that each stand alone."""
        why = "a part of a text need not have its label"
        return [*super().problems(), *whole_texts(self.config, "classification", why)]

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.labelled_texts_encoder import LabelledTextEncoder, TagEncoder

        if self.config.task == "token":
            return TagEncoder(tokenizer, source, self._names)
        return LabelledTextEncoder(tokenizer, source, self._names, several=self.config.multi_label)

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        config = self.config
        return {"task": config.task, "several": config.multi_label, "labels": self._names}

    def samples(
        self, sources: list[SourceDocuments], cut: Cut, *, store: Store,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> Prepared:  # fmt: skip
        from arctic_like.data.labelled_texts_encoder import LabelledSamples, TagSamples
        from arctic_like.data.pairs_of_texts_samples import unit_samples

        made = TagSamples if self.config.task == "token" else LabelledSamples
        return unit_samples(
            sources, cut, store=store, share=share, made=made, kind=f"labelled {self.config.task}s"
        )

    def _sets(self, entries: Any, cut: Cut, store: Store) -> dict[str, Prepared]:
        # here and not in `build`, whose parameters say what a run has to bring
        if problems := self.problems():
            raise RecipeError(problems)
        if not self._names:
            self._names = self._found(store)
        if len(self._names) < 2 and not self.config.multi_label:
            raise RecipeError(
                Problem(
                    f"has one label, {self._names[0]!r}: there is nothing to tell apart",
                    place="data.sources", hint="add rows with another label, or state data.labels",
                )
            )  # fmt: skip
        sets = super()._sets(entries, cut, store)
        for one in sets.values():
            one.facts = {
                **one.facts, "label_names": list(self._names), "num_classes": len(self._names),
            }  # fmt: skip
        return sets

    def _found(self, store: Store) -> list[str]:
        """The labels of the training rows, numbers by size, then others by letter; found once and kept."""
        from arctic_like.data import cache

        sources = [make_source(source) for source in self.config.sources]
        config = self.config
        keys = [[one.content_key(), one.config.role_mapping] for one in sources]
        key = cache.key_of([cache.VERSION, "labels", config.task, config.multi_label, keys])

        def read(folder: Path) -> dict[str, Any]:
            found = set[str]()
            for source in sources:
                found |= self._labels_of(source.rows(), source.config)
            return {"labels": sorted(found, key=_order)}

        entry = cache.obtain(
            store.root / "labels", key, read, missing_ok=store.missing_ok, what="the labels"
        )
        names: list[str] = cache.facts(entry)["labels"]
        if not names:
            raise RecipeError(
                Problem(
                    "holds no row with a label", place="data.sources",
                    hint="say which column it is with role_mapping: {label: …}",
                )
            )  # fmt: skip
        return names

    def _labels_of(self, rows: Iterable[ReadRow], source: SourceConfig) -> set[str]:
        """What is a label in these rows; what is wrong with others is said where they are encoded."""
        from arctic_like.data.columns import RowError
        from arctic_like.data.labelled_texts_encoder import labels_of, tags_of

        found: set[str] = set()
        for _, row in rows:
            if isinstance(row, BadRow):
                continue
            try:
                if self.config.task == "token":
                    found.update(tags_of(row, source)[1])
                else:
                    found.update(labels_of(row, source, several=self.config.multi_label))
            except RowError:
                continue
        return found


def label_name(value: Any) -> str:
    """A label as text: numbers and truth values too. Raises ValueError for anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, str) and value):
        return str(value)
    raise ValueError(f"{value!r} is no label")


def _order(name: str) -> tuple[bool, int, str]:
    number = name.removeprefix("-").isdecimal()
    return not number, int(name) if number else 0, name
