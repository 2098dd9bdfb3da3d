"""What a recipe's `data:` describes, what comes out of it, and the families that read it.

    DataSource    rows of a file, a folder, a Hub data set or a user's own code
    DataFactory   rows → documents → samples: tokenised, masked, cut, packed, cached

Light: no numpy, pyarrow or torch is imported with this module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, field_validator, model_validator

from arctic_like.config.base import PartConfig, wrong
from arctic_like.config.values import (
    HumanFloat,
    HumanInt,
    NameOrPath,
    OneOrMany,
    RecipePath,
    UnnamedToo,
)
from arctic_like.errors import Problem, RecipeError
from arctic_like.registry import Part
from arctic_like.registry.choice import Choice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from arctic_like.data.order import Plan
    from arctic_like.world import World

LongSamples = Literal["error", "drop", "truncate_left", "truncate_right", "split"]
OnBadSample = Literal["error", "skip"]
TrainOn = Literal["assistant", "last_assistant", "all"]
Shape = Literal[
    "auto", "text", "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "unpaired",
    "question_answer", "tokenised",
]  # fmt: skip
Sample = dict[str, "NDArray[np.int64]"]
"""`input_ids`, `labels`, `position_ids`, and what a factory adds to each token (`source_ids`,
`segment_ids`, …): int64 arrays of one length."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. Readers yield one in the place of the row, encoders list theirs;
    `on_bad_sample` decides whether it ends the preparation or is counted.

    message: follows the place in a sentence: value, rule. file, line: where it stands, if in a
    file.
    """

    place: str
    message: str
    hint: str = ""
    file: str = ""
    line: int | None = None

    def error(self) -> RecipeError:
        """The error that names it."""
        if self.file:
            return RecipeError(
                Problem(self.message, file=self.file, line=self.line, hint=self.hint)
            )
        hint = f"; {self.hint}" if self.hint else ""
        return RecipeError(f"{self.place} {self.message}{hint}")


Row = tuple[str, dict[str, Any]]
"""Where a row comes from ("train.jsonl:17"), and what stands in it."""

ReadRow = tuple[str, dict[str, Any] | BadRow]
"""A row as a source gives it: one that cannot be read stands there as a `BadRow`."""

Cursor = dict[str, Any]
"""A place between two rows of a source, as JSON; what is in it is the source's own business."""

Followed = tuple[Cursor, str, dict[str, Any] | BadRow]
"""The cursor after a row, the row's place, and the row."""


class SourceConfig(PartConfig):
    """One entry of `data.sources` or `data.eval_sources`; a bare string is its `name_or_path`."""

    splits_in_name: ClassVar[bool] = True
    """Whether `name_or_path` may end in `:split`."""

    type: str = "huggingface"
    """How it is read: `huggingface` (files and the Hub), `huggingface_instruct`,
    `huggingface_causal`, `file`, `sql`, `python`, or your own."""

    name_or_path: NameOrPath = ""
    """A file (jsonl, json, csv, tsv, parquet, arrow, txt, md; also compressed: .gz, .bz2, .xz,
    .zst), a glob of files, a folder, a URL (s3://, gs://, https://), or a Hub name;
    `name:split` and `name:split[:100]` name a split and a part of it."""

    shape: Shape = "auto"
    """What the rows hold; found from each row's columns unless given."""

    label: str = ""
    """Name of the source in reports and metrics; its file or data set unless given."""

    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""

    split: str = ""
    """Split to read, `train` (`eval` for evaluation) unless given; may end with a slice:
    `train[:10%]`."""

    sample_ratio: HumanFloat | None = Field(default=None, gt=0, le=1)
    """Read this share of the rows, drawn by `sample_seed`, in their order."""

    sample_count: HumanInt | None = Field(default=None, ge=1)
    """Read this many rows, drawn by `sample_seed`, in their order."""

    sample_seed: HumanInt = 42
    """Which rows `sample_ratio` and `sample_count` draw."""

    weight: HumanFloat | None = Field(default=None, gt=0)
    """Share of this source in the mix, beside the other sources' weights (`data.mix_by`,
    `data.mix_until`). Give it to all sources or to none."""

    repeat: HumanFloat = Field(default=1.0, gt=0)
    """How often the source is passed in one epoch: 2 sees every sample twice, 0.5 the other half
    in the next epoch."""

    long_samples: LongSamples | None = None
    """What to do with documents of this source above `max_length`; `data.long_samples` unless
    given."""

    on_bad_sample: OnBadSample | None = None
    """What to do with rows of this source that cannot be used; `data.on_bad_sample` unless
    given."""

    train_on: TrainOn | None = None
    """What of this source's conversations is trained; `data.train_on` unless given."""

    process: bool = True
    """Off for rows that are tokenised already: they hold `input_ids`, and `labels` if not all are
    trained."""

    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments: of `datasets.load_dataset` for a Hub name, of the reader for a file, of
    the function for `python`."""

    split_mapping: dict[str, str] = Field(default_factory=dict)
    """Other names of splits: `{train: train_sft, eval: test_sft}`."""

    role_mapping: dict[str, str] = Field(default_factory=dict)
    """Role → where its text stands: a column (`{user: question, assistant: answer}`), the turns
    of a list (`{user: conversations.from.human, assistant: conversations.from.gpt}`), or a template
    of columns (`{user: "{{ question }} {{ context }}"}`)."""

    content_key: str = ""
    """Key of a turn's text in lists of turns; found among content, value, text, message unless
    given."""

    column: str = ""
    """Column that holds the text or the turns, where it is not one of the usual names; of a text
    also a template (`"{{ title }} {{ body }}"`)."""

    @property
    def title(self) -> str:
        """The source's name in reports and metrics; of a path its last part."""
        name = self.name_or_path
        if name.startswith(("/", "./", "../", "~")) or "://" in name:
            name = name.rstrip("/").rpartition("/")[2]
        return self.label or name or self.type

    @property
    def tokenised(self) -> bool:
        """Whether the rows are tokens already."""
        return not self.process or self.shape == "tokenised"

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        """What is known of data sets of the Hub by their name, where the recipe does not say it."""
        from arctic_like.data.presets import with_preset

        return with_preset(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _whole_templates(self) -> SourceConfig:
        from arctic_like.data.columns import is_template, template_problem

        stated = {f"role_mapping.{role}": path for role, path in self.role_mapping.items()}
        for place, path in {**stated, "column": self.column}.items():
            if is_template(path) and (reason := template_problem(path)):
                raise wrong(f"is {path!r}, no whole template ({reason})", place=place,
                            hint="write {{ column }}")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _one_way_to_draw(self) -> SourceConfig:
        if self.sample_ratio is not None and self.sample_count is not None:
            raise wrong(
                "and sample_count are both given", place="sample_ratio", hint="keep one of them"
            )
        return self


AnySource = Annotated[SourceConfig, Choice("source", short="name_or_path", default="huggingface")]
"""A source by its `type:`, or a bare string that is its `name_or_path`."""

Sources = Annotated[list[AnySource], OneOrMany()]
"""A list of sources, or one."""


class DataConfig(PartConfig):
    """The recipe's `data:`."""

    aliases = {"pad_to_multiple_of": "div_length"}
    no_effect = {
        "cache_fs_type": "the preparing process is found by a lock in the cache itself, which is "
        "right on local and on shared file systems",
        "use_data_cache": "tokenised data is always cached",
        "cache_processed_data": "tokenised data is always cached",
    }
    not_yet = {
        "fuse_positions_prob": "nothing replaces it: packed documents never see each other",
        "sample_weighted_loss": "the loss is the mean over all trained tokens; a trainer of your "
        "own may weigh them otherwise (`weight`)",
    }

    sources: Sources = Field(default_factory=list)
    """What to train on: a list of sources, or one."""

    eval_sources: Annotated[dict[str, Sources], UnnamedToo("eval")] = Field(default_factory=dict)
    """What to evaluate on: a list of sources (one set, `eval`), or a map of name → sources (several
    sets)."""

    test_sources: Annotated[dict[str, Sources], UnnamedToo("test")] = Field(default_factory=dict)
    """What to test on, once, after training (`test_at_end`) or without it (`test_only`): a list of
    sources (one set, `test`), or a map of name → sources (several sets)."""

    train_eval_split: tuple[HumanFloat, HumanFloat] = (1.0, 0.0)
    """Shares of the training rows to train on and to hold out as the evaluation set `eval`."""

    max_length: HumanInt | None = Field(default=None, ge=2)
    """Longest sample in tokens; the model's positions unless given."""

    long_samples: LongSamples | None = None
    """What to do with a document of more than `max_length` tokens: `error`, `drop`, `truncate_left`
    (keep its end), `truncate_right` (keep its start), `split`; counted and reported. By default
    `drop` for conversations (a cut one would teach wrong endings or answers to nothing) and `split`
    for text."""

    on_bad_sample: OnBadSample = "error"
    """What to do with rows that cannot be used (broken JSON, no content, roles out of order): end
    with the first one's file, line and what is expected, or `skip` and count them."""

    mix_by: Literal["sample", "token"] = "sample"
    """What the sources' `weight`s are shares of."""

    mix_until: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """How long an epoch of weighted sources is: until the first of them is passed once (none is
    repeated), or until all are (small ones are repeated)."""

    streaming: bool = False
    """Read, tokenise and pack while training, block after block, for data that does not fit on
    disk. Needs `train_iters`; resumes exactly."""

    streaming_window: HumanInt = Field(default=4096, ge=1)
    """Rows of one block in streaming: what is shuffled and packed together."""

    filter_samples: bool = True
    """On is `long_samples: drop`; off needs `long_samples` to say what else."""

    pack_samples: bool = True
    """Fill each sample with several documents, which never see each other."""

    always_max_length: bool = False
    """With packing: fill every sample to exactly `max_length` by cutting documents at its end; the
    rest of a document opens the next sample, as a document of its own."""

    mask_inputs: bool = True
    """Train only what the assistant wrote; off is `train_on: all`."""

    train_on: TrainOn | None = None
    """What of a conversation is trained: `assistant` (every answer, the default),
    `last_assistant` (the last one), `all` (every token). A message's own `train: true/false`, or
    `train: [[start, stop], …]` in characters of its content, goes before it."""

    train_end_of_turn: bool = True
    """Train the token that ends an answer, so that the model learns to stop."""

    thinking: Literal["keep", "drop"] = "keep"
    """Keep `<think>…</think>` blocks of answers, or take them out before rendering."""

    ignore_empty_think: bool = False
    """Leave an empty `<think></think>` at the start of an answer untrained."""

    pad_to: Literal["div_length", "max_length"] = "div_length"
    """Pad micro-batches to their longest sample, rounded up by `div_length`, or to `max_length`."""

    div_length: HumanInt = Field(default=8, ge=1)
    """Lengths of padded micro-batches are multiples of this, but never above `max_length`."""

    group_by_length: bool = False
    """Put samples of like length into the same global batch, for less padding of what is not
    packed. Depends on data, seed and global batch size only."""

    longest_first: bool = True
    """Begin epoch 0 with the longest samples of the epoch, one global batch of them: a run that would
    run out of memory does so at its first step. They change places with those that stood there; a
    stream, and data whose samples have no lengths, cannot be looked through and stay as they are."""

    max_tokens_per_batch: HumanInt | None = Field(default=None, ge=1)
    """Cut each rank's share of a global batch into micro-batches of at most so many tokens, padding
    included, in place of `micro_batch_size` rows."""

    balance: bool = True
    """Give every rank and micro-batch of a global batch about the same work, by length."""

    source_metrics: bool | None = None
    """Log each source's loss and trained tokens; on unless given where there are several."""

    drop_last: bool = False
    """Leave out the short last global batch of each epoch (other samples in each epoch)."""

    seed: HumanInt | None = None
    """Order of samples and what is held out; the recipe's `seed` unless given."""

    num_proc: HumanInt | None = Field(default=None, ge=0)
    """Processes that render and tokenise; one for each core (but one in all for a stream, beside
    which the cores train) if 0 or not given. One uses the tokenizer's own threads."""

    dl_num_workers: HumanInt = Field(default=0, ge=0)
    """Processes on each rank that put batches together ahead of time."""

    cache_dir: RecipePath | None = None
    """Where tokenised data is kept; $ARCTIC_LIKE_CACHE, or ~/.cache/arctic_like, unless given."""

    verify_content: bool = False
    """Read the content of every file again, even where path, size, time and inode are as when its
    hash was remembered."""

    fail_on_missing_cache: bool = False
    """Refuse to tokenise: stop unless all data is in the cache."""

    cache_fs_type: Literal["auto", "local", "shared"] = "auto"
    """Has no effect: a lock in the cache itself finds who prepares."""

    use_data_cache: bool | None = None
    """Has no effect: tokenised data is always cached."""

    cache_processed_data: bool | None = None
    """Has no effect: tokenised data is always cached."""

    repeat_to_pack_max_length: bool = False
    """Repeat the documents of a training set that do not fill one sample of `max_length` until it
    is full. Needs `pack_samples`."""

    sample_weighted_loss: bool = False
    """Weigh every sample of a pack alike, in place of every token. Not built yet."""

    fuse_positions_prob: HumanFloat = Field(default=0.0, ge=0, le=1)
    """Let packed documents see each other with this probability. Not built yet."""

    @field_validator("eval_sources", "test_sources", mode="before")
    @classmethod
    def _sets_are_named(cls, value: Any) -> Any:
        one = isinstance(value, dict) and value.keys() & SourceConfig.model_fields.keys()
        if one or isinstance(value, str):
            raise wrong("is one source; expected is a list", hint="put `- ` before the source")
        return value

    @model_validator(mode="after")
    def _masked_one_way(self) -> DataConfig:
        if self.given("mask_inputs") and self.train_on is not None:
            raise wrong("and train_on are both given", place="mask_inputs", hint="keep train_on")
        return self

    @model_validator(mode="after")
    def _repeated_packs(self) -> DataConfig:
        if self.repeat_to_pack_max_length and not self.pack_samples:
            raise wrong(
                "is on, but nothing is packed",
                place="repeat_to_pack_max_length",
                hint="leave it out, or set pack_samples: true",
            )
        return self

    @model_validator(mode="after")
    def _mixed_one_way(self) -> DataConfig:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise wrong(
                "has no weight, but other sources have one",
                place=f"sources.{weighted.index(False)}",
                hint="give a weight to every source, or to none",
            )
        for key in ("mix_by", "mix_until"):
            if self.given(key) and not any(weighted):
                raise wrong(
                    "says how weights are meant, but no source has one",
                    place=key,
                    hint="give each source a weight, or leave it out",
                )
        for path, sources in self.held_out().items():
            for number, source in enumerate(sources):
                if source.weight is not None or source.repeat != 1:
                    raise wrong(
                        "has a weight or a repeat, but an evaluation reads every sample once",
                        place=f"{path}.{number}",
                        hint="leave it out, or make it a set of its own",
                    )
        return self

    @model_validator(mode="after")
    def _streamed_one_way(self) -> DataConfig:
        if not self.streaming:
            return self
        unknown = "needs the whole set, which streaming never has"
        for key, stated, hint in (
            ("train_eval_split", self.train_eval_split[1] > 0, "name eval_sources"),
            ("group_by_length", self.group_by_length, "set max_tokens_per_batch"),
            ("longest_first", self.longest_first and self.given("longest_first"), "leave it out"),
            ("repeat_to_pack_max_length", self.repeat_to_pack_max_length, "leave it out"),
            ("mix_until", self.given("mix_until"), "leave it out: a stream has no epochs"),
            ("drop_last", self.drop_last, "leave it out: a stream has no epochs"),
            ("fail_on_missing_cache", self.fail_on_missing_cache, "leave it out"),
        ):
            if stated:
                raise wrong(unknown, place=key, hint=hint)
        for number, source in enumerate(self.sources):
            drawn = source.sample_ratio is not None or source.sample_count is not None
            if drawn or source.repeat != 1:
                key = "repeat" if source.repeat != 1 else "sample_ratio"
                key = "sample_count" if source.sample_count is not None else key
                raise wrong(
                    unknown,
                    place=f"sources.{number}.{key}",
                    hint="give every source a weight, or read a slice: name:train[:1000]",
                )
        return self

    def held_out(self) -> dict[str, list[SourceConfig]]:
        """Place below `data` → the sources of each evaluation and test set."""
        evaluation = {f"eval_sources.{name}": one for name, one in self.eval_sources.items()}
        return {**evaluation, **{f"test_sources.{n}": one for n, one in self.test_sources.items()}}

    @property
    def trained_turns(self) -> TrainOn:
        """`train_on`, also where the recipe says it by `mask_inputs`."""
        return self.train_on or ("assistant" if self.mask_inputs else "all")

    @model_validator(mode="after")
    def _split_adds_up(self) -> DataConfig:
        train, held_out = self.train_eval_split
        if min(train, held_out) < 0 or abs(train + held_out - 1) > 1e-9 or train == 0:
            raise wrong(
                f"is [{train}, {held_out}], not two shares that add up to 1",
                place="train_eval_split",
                hint="write [0.9, 0.1] to hold out a tenth",
            )
        if held_out and self.eval_sources:
            raise wrong(
                "holds out rows although eval_sources are given",
                place="train_eval_split",
                hint="keep one of them",
            )
        return self


class DataSource(Part, family="source"):
    """Reads rows. A source of one's own writes `rows`; `process` in its config says what they hold.

    Rows of a conversation have `messages` (a list of `role` and `content`) or `prompt` and
    `completion`; rows of text have `text`; rows with `process: false` have `input_ids`.
    """

    config_type = SourceConfig
    config: SourceConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls.config_type, SourceConfig):
            raise TypeError(f"{cls.__qualname__}.config_type must be a SourceConfig class")

    def problems(self) -> list[Problem]:
        """What is wrong and can be seen at once, without reading: places below the source's own."""
        return []

    def rows(self) -> Iterator[ReadRow]:
        """Every row with its place, in an order that never changes. Sampling is not its
        business."""
        raise NotImplementedError

    def rows_from(self, cursor: Cursor | None = None) -> Iterator[Followed]:
        """The rows of `rows` after a cursor (None: from the first on), each with the cursor after
        it, for streaming. By default the cursor counts rows, and those before it are read again.

        A cursor belongs to the source's config as it was, and to rows that have not changed.
        """
        passed = 0 if cursor is None else int(cursor["rows"])
        for count, (place, row) in enumerate(self.rows(), 1):
            if count > passed:
                yield {"rows": count}, place, row

    def expected_rows(self) -> int | None:
        """About how many rows there are, where that is known without reading them; asked behind
        `content_key`, to show progress."""
        return None

    def content_key(self) -> str:
        """Changes exactly when the rows change. By default found by reading all of them."""
        import json

        import xxhash

        digest = xxhash.xxh3_128()
        for place, row in self.rows():
            digest.update(json.dumps([place, row], sort_keys=True, default=repr).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """A few words for reports: what is read."""
        return self.config.name_or_path or type(self).__name__


class SampleSet(ABC):
    """A set of samples: map-style, picklable, and in memory only as far as it is read.

    lengths: tokens of each sample. weights: trained tokens of each sample, which is the number of
    labels other than -100 (the first label of a document never counts).
    """

    lengths: NDArray[np.int64]
    weights: NDArray[np.int64]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """`input_ids`, `labels`, `position_ids` of one sample, each (length,) int64."""

    @abstractmethod
    def sample_id(self, index: int) -> str:
        """Where the sample comes from: "train.jsonl:17"; of a pack its first documents, "… +5"."""

    def places(self, index: int) -> list[str]:
        """Where each document of the sample comes from, in their order."""
        return [self.sample_id(index)]

    def entries(self) -> list[Path]:
        """The cache's entries that the set is read from."""
        return []


@dataclass(frozen=True)
class PreparedData:
    """What a DataFactory hands to the trainer.

    evaluation: name → set, in the recipe's order. facts: numbers about the training set (`samples`,
    `documents`, `tokens`, `trained_tokens`, `dropped`, `truncated`, `fill_rate`, `max_length`),
    which other parts may ask for by name. test: as `evaluation`, measured by the test stage. plan:
    global batch size → the order of the training samples, where it is not the seeded one over the
    whole set. sources: the training sources' titles, which a sample's `source_ids` count. collate:
    samples → `input_ids`, `labels`, `position_ids` and what else they hold, each (micro_batch, length)
    int64; where it has `padded`, that gives the length of a batch by its longest sample. report:
    lines for the console: what was read, cut and packed.
    """

    train: SampleSet | None
    evaluation: dict[str, SampleSet]
    collate: Callable[[list[Sample]], dict[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)
    report: str = ""
    test: dict[str, SampleSet] = field(default_factory=dict)
    plan: Callable[[int], Plan] | None = None
    sources: tuple[str, ...] = ()


class DataFactory(Part, family="data"):
    """Turns the recipe's sources into samples. Prepares once; other processes wait and read."""

    config_type = DataConfig
    config: DataConfig

    def problems(self) -> list[Problem]:
        """What is wrong and can be seen at once, before anything is imported or read."""
        listed = {"sources": self.config.sources}
        listed |= self.config.held_out()
        return [
            replace(problem, place=f"data.{path}.{number}.{problem.place}")
            for path, sources in listed.items()
            for number, source in enumerate(sources)
            for problem in make_source(source).problems()
        ]

    def build(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        output_dir: Path,
        seed: int,
        world: World,
        max_positions: int | None = None,
        micro_batch_size: int = 1,
    ) -> PreparedData:
        """Prepare all sets, or find them prepared.

        max_positions: what the model can hold, None where it has no bound. Raises RecipeError for
        settings and data that cannot be trained on, RunError where another process failed to
        prepare.
        """
        raise NotImplementedError


def usable(rows: Iterable[ReadRow]) -> Iterator[Row]:
    """The rows as they are. Raises RecipeError at the first one that cannot be read."""
    for place, row in rows:
        if isinstance(row, BadRow):
            raise row.error()
        yield place, row


def make_source(config: SourceConfig) -> DataSource:
    """The source that a config describes."""
    from arctic_like.registry import build

    return cast("DataSource", build(config, "source"))
