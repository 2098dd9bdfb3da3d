"""The data factories of conversations (`sft`) and texts (`causal`), and what all that make tokens
have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from arctic_like.data.base import (
    DataConfig,
    DataFactory,
    LongSamples,
    PreparedData,
    SampleSet,
    SourceConfig,
    make_source,
)
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arctic_like.data.encode import Encoder
    from arctic_like.data.mix import Mixture
    from arctic_like.data.order import Plan
    from arctic_like.data.prepare import Cut, Prepared, SourceDocuments
    from arctic_like.data.stream_samples import StreamSamples
    from arctic_like.data.tokenise import Store
    from arctic_like.world import World


class SFTDataConfig(DataConfig):
    """The recipe's `data:` for conversations."""

    type: str = "sft"


class CausalDataConfig(DataConfig):
    """The recipe's `data:` for plain texts."""

    type: str = "causal"


TEST = "test: "
"""How names of test sets begin, beside those of evaluation sets."""


class TokenDataFactory(DataFactory):
    """What conversations and texts have in common: cached documents, cut, packed, padded.

    A subclass says how rows become tokens (`encoder`) and what that depends on (`shape`).
    """

    config: DataConfig

    default_long: ClassVar[LongSamples]
    """`long_samples` where the recipe states nothing."""

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        """Rows of a source → tokens and masks."""
        raise NotImplementedError

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        """The settings that shape a source's tokens and masks, besides tokenizer and rows."""
        raise NotImplementedError

    def build(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        output_dir: Path,
        seed: int,
        world: World,
        max_positions: int | None = None,
        micro_batch_size: int = 1,
        train_iters: int = 0,
    ) -> PreparedData:
        from arctic_like.data import cache, hashes
        from arctic_like.data.collate import PaddingCollate
        from arctic_like.data.mix import titles
        from arctic_like.data.prepare import Cut
        from arctic_like.data.report import report
        from arctic_like.data.tokenise import Store

        config = self.config
        max_length = self._max_length(max_positions)
        cut = Cut(
            max_length=max_length,
            pack=config.pack_samples,
            fill=config.always_max_length,
            seed=seed if config.seed is None else config.seed,
            repeat=config.repeat_to_pack_max_length,
        )
        store = Store(
            cache.root(config.cache_dir), config.num_proc or 0, not config.fail_on_missing_cache,
            config.on_bad_sample,
        )  # fmt: skip
        fingerprint = tokenizer_key(tokenizer)

        def entries(sources: list[SourceConfig]) -> list[SourceDocuments]:
            return self._documents(tokenizer, fingerprint, sources, store)

        with hashes.remembered(store.root, verify=config.verify_content):
            sets = self._sets(entries, cut, store)
        for name, one in sets.items():
            _refuse_empty(name, one, self._described(name))
        train = sets.pop("train", None)
        evaluation: dict[str, SampleSet] = {}
        test: dict[str, SampleSet] = {}
        for name, one in sets.items():
            (test if name.startswith(TEST) else evaluation)[name.removeprefix(TEST)] = one.samples
        mix = self._mixture(train)
        stream = self._stream(tokenizer, cut, output_dir, world) if config.streaming else None
        reported = {**({"train": train} if train else {}), **sets}
        lines = [report(reported, cut)] if reported else []
        lines += [mix.report()] if mix else []
        facts = {**(train.facts if train else {}), **({"mix": mix.facts()} if mix else {})}
        if stream is not None:
            window = config.streaming_window
            lines.insert(
                0, f"train: streamed in blocks of {window:,} rows from {self._described('train')}"
            )
            facts = {"max_length": max_length, "streaming_window": window}
        return PreparedData(
            train=stream or (self._sourced(train.samples) if train else None),
            evaluation=evaluation,
            test=test,
            plan=self._plan(train, mix, cut.seed, train_iters),
            sources=titles(config.sources),
            collate=PaddingCollate(
                pad_token_id=int(tokenizer.pad_token_id or 0),
                multiple=config.div_length,
                at_most=max_length,
                fixed=config.pad_to == "max_length",
            ),
            facts=facts,
            report="\n".join(lines),
        )

    def _documents(
        self, tokenizer: PreTrainedTokenizerBase, fingerprint: str, sources: list[SourceConfig],
        store: Store,
    ) -> list[SourceDocuments]:  # fmt: skip
        """The documents of each source, prepared or found."""
        from arctic_like.data.tokenise import documents

        folders = [
            documents(
                make_source(source),
                shape={**self._shape(source), "tokenizer": fingerprint},
                encoder=lambda source=source: self._encoder(tokenizer, source),  # type: ignore[misc]
                store=store,
            )
            for source in sources
        ]
        return self._named(sources, list(enumerate(folders)))

    def _named(
        self, sources: list[SourceConfig], folders: list[tuple[int, Path]]
    ) -> list[SourceDocuments]:
        """Documents with what is said of their sources, whose numbers are given."""
        from arctic_like.data.mix import titles
        from arctic_like.data.prepare import SourceDocuments

        names = titles(sources)
        return [
            SourceDocuments(folder, names[number], self._long_samples(sources[number]))
            for number, folder in folders
        ]

    def _stream(
        self, tokenizer: PreTrainedTokenizerBase, cut: Cut, output_dir: Path, world: World
    ) -> StreamSamples:
        """The training samples, made while training."""
        from arctic_like.data.mix import stated_weights, titles
        from arctic_like.data.stream import BlockMaker, StreamedSource
        from arctic_like.data.stream_samples import StreamSamples

        config = self.config
        fingerprint = tokenizer_key(tokenizer)
        maker = BlockMaker(
            folder=output_dir / "stream",
            sources=tuple(
                StreamedSource(
                    title,
                    make_source(source),
                    encoder=lambda source=source: self._encoder(tokenizer, source),  # type: ignore[misc]
                    shape={**self._shape(source), "tokenizer": fingerprint},
                    on_bad_sample=source.on_bad_sample or config.on_bad_sample,
                )
                for title, source in zip(titles(config.sources), config.sources, strict=True)
            ),
            samples=lambda parts, store: self.samples(
                self._named(config.sources, parts), cut, store=store
            ),
            window=config.streaming_window,
            # the other cores are training
            num_proc=config.num_proc or 1,
            weights=stated_weights(config.sources),
            by_token=config.mix_by == "token",
        )
        return StreamSamples(
            maker, seed=cut.seed, prepares=world.local_rank == 0, told=self._told_apart()
        )

    def _mixture(self, train: Prepared | None) -> Mixture | None:
        from arctic_like.data.mix import is_mixed, mixture

        if train is None or not is_mixed(self.config.sources):
            return None
        return mixture(self.config, cast("Any", train.samples).sets)

    def _sourced(self, samples: SampleSet) -> SampleSet:
        """The training samples, with their sources where those are to be told apart."""
        from arctic_like.data.mix import with_sources

        return with_sources(samples, len(self.config.sources)) if self._told_apart() else samples

    def _told_apart(self) -> bool:
        """Whether tokens get the numbers of their sources."""
        wanted = self.config.source_metrics
        return len(self.config.sources) > 1 if wanted is None else wanted

    def _plan(
        self, train: Prepared | None, mix: Mixture | None, seed: int, train_iters: int
    ) -> Callable[[int], Plan] | None:
        """Global batch size → the order of the training samples. A stream has no epochs: the run is
        taken for one."""
        from arctic_like.data.endless import SequentialPlan
        from arctic_like.data.order import BatchPlan, GroupedPlan

        if self.config.streaming:
            return lambda size: SequentialPlan(1 << 40, max(1, train_iters) * size, size)
        if train is None:
            return None
        samples = train.samples
        drop_last, grouped = self.config.drop_last, self.config.group_by_length

        def plan(size: int) -> Plan:
            whole: Plan = (
                mix.plan(size, seed=seed, drop_last=drop_last)
                if mix
                else BatchPlan(len(samples), size, seed, drop_last=drop_last)
            )
            return GroupedPlan(whole, samples.lengths, seed) if grouped else whole

        return plan

    def _set(
        self, sources: list[SourceDocuments], cut: Cut, store: Store, share: tuple[float, float]
    ) -> Prepared:
        """The samples of the training sources: packed across them, or where they are mixed each by
        itself, one after another. A share is then of each."""
        from arctic_like.data.mix import is_mixed, joined

        if not is_mixed(self.config.sources):
            return self.samples(sources, cut, store=store, share=share)
        return joined([self.samples([one], cut, store=store, share=share) for one in sources])

    def samples(
        self,
        sources: list[SourceDocuments],
        cut: Cut,
        *,
        store: Store,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> Prepared:
        """The samples of one set from its documents: `prepare.samples`, unless a subclass knows
        what belongs together."""
        from arctic_like.data.prepare import samples

        return samples(sources, cut, store=store, share=share)

    def _sets(self, entries: Any, cut: Cut, store: Store) -> dict[str, Prepared]:
        """Name → set: `train` first, then the evaluation sets in the recipe's order."""
        config = self.config
        if "train" in config.eval_sources:
            raise RecipeError(
                Problem("names a set 'train'", place="data.eval_sources", hint="name it otherwise")
            )
        sets: dict[str, Prepared] = {}
        if config.sources and not config.streaming:
            trained = entries(config.sources)
            share = config.train_eval_split[0]
            sets["train"] = self._set(trained, cut, store, (0.0, share))
            if share < 1:
                sets["eval"] = self._set(trained, replace(cut, repeat=False), store, (share, 1.0))
        for name, sources in config.eval_sources.items():
            found = entries([_for_evaluation(source) for source in sources])
            # an evaluation reads every sample once
            sets[name] = self.samples(found, replace(cut, repeat=False), store=store)
        for name, sources in config.test_sources.items():
            found = entries([_for_evaluation(source, "test") for source in sources])
            sets[f"{TEST}{name}"] = self.samples(found, replace(cut, repeat=False), store=store)
        if not sets and not (config.streaming and config.sources):
            raise RecipeError(
                Problem(
                    "is empty: there is nothing to train on",
                    place="data.sources",
                    hint="name a file, a folder or a Hub data set",
                )
            )
        return sets

    def _described(self, name: str) -> str:
        sources = self.config.held_out().get(_place(name), self.config.sources)
        return ", ".join(make_source(source).describe() for source in sources)

    def _encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.encoders import TokenEncoder

        return TokenEncoder(len(tokenizer)) if source.tokenised else self.encoder(tokenizer, source)

    def _shape(self, source: SourceConfig) -> dict[str, Any]:
        if source.tokenised:
            return {"factory": "tokens"}
        return {"factory": self.name, "rows": source.shape, **self.shape(source)}

    def _max_length(self, max_positions: int | None) -> int:
        stated = self.config.max_length
        if stated is None and max_positions is None:
            raise RecipeError(
                Problem(
                    "is needed: the model has no number of positions to take it from",
                    place="data.max_length",
                    hint="set it to the longest sample, in tokens",
                )
            )
        if stated is not None and max_positions is not None and stated > max_positions:
            raise RecipeError(
                Problem(
                    f"({stated}) exceeds the model's {max_positions} positions",
                    place="data.max_length",
                    hint="lower it, or give the model more positions (max_position_embeddings, "
                    "rope_scaling)",
                )
            )
        return stated if stated is not None else int(max_positions or 0)

    def _long_samples(self, source: SourceConfig) -> LongSamples:
        config = self.config
        stated = source.long_samples or config.long_samples
        if stated is not None:
            return stated
        if not config.filter_samples:
            raise RecipeError(
                Problem(
                    "is off, so documents longer than max_length stay, but nothing says how",
                    place="data.filter_samples",
                    hint="set data.long_samples: truncate_left, truncate_right or split",
                )
            )
        return "drop" if config.given("filter_samples") else self.default_long


class SFTDataFactory(TokenDataFactory):
    """Conversations, rendered with the chat template; what the assistant wrote is trained."""

    name = "sft"
    config_type = SFTDataConfig
    # a conversation cut on the right ends without its end, one cut on the left answers nothing
    default_long = "drop"

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.encoders import ConversationEncoder, MaskRules

        return ConversationEncoder(tokenizer, source, MaskRules.of(self.config, source))

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        from arctic_like.data.encoders import MaskRules

        return MaskRules.of(self.config, source).key()


class CausalDataFactory(TokenDataFactory):
    """Texts with an end token, trained from their second token on."""

    name = "causal"
    config_type = CausalDataConfig
    # no token of a long text is worth less than another
    default_long = "split"

    def encoder(self, tokenizer: PreTrainedTokenizerBase, source: SourceConfig) -> Encoder:
        from arctic_like.data.encoders import DocumentEncoder

        return DocumentEncoder(tokenizer, source)

    def shape(self, source: SourceConfig) -> dict[str, Any]:
        return {}


def _for_evaluation(source: SourceConfig, split: str = "eval") -> SourceConfig:
    """A source of an evaluation or test set: its split is `split` unless it says otherwise."""
    from arctic_like.data.sources import stated_part

    name, part = stated_part(source)
    if part.split:
        return source
    bounds = f"[{part.start}:{part.stop}]" if part.start or part.stop else ""
    changed: SourceConfig = source.replace(name_or_path=name, split=f"{split}{bounds}")
    return changed


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with everything of a tokenizer that shapes tokens: its core, template and special
    tokens."""
    import json

    import tokenizers
    import transformers

    from arctic_like.data.cache import key_of

    core = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
    if core is not None:
        # what a call sets in passing
        core.pop("padding", None)
        core.pop("truncation", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    versions = [tokenizers.__version__, transformers.__version__]
    template = tokenizer.chat_template
    return key_of([type(tokenizer).__name__, core, template, special, versions])


def _place(name: str) -> str:
    """The place below `data` of a held-out set's sources."""
    if name.startswith(TEST):
        return f"test_sources.{name.removeprefix(TEST)}"
    return f"eval_sources.{name}"


def _refuse_empty(name: str, prepared: Prepared, described: str) -> None:
    """Raise RecipeError for a set without a sample; says what became of its documents."""
    if len(prepared.samples):
        return
    facts = prepared.facts
    place = "data.sources" if name in ("train", "eval") else f"data.{_place(name)}"
    if not facts["documents"] and facts["bad"]:
        message = f"holds no row that can be used ({described}): {facts['bad']:,} were skipped"
        first = next(one["bad_examples"][0] for one in facts["sources"] if one["bad"])
        hint = f"the first: {first['place']} {first['message']}"
    elif not facts["documents"]:
        message, hint = f"holds no row ({described})", "check the path and the split"
    elif facts["untrained"] == facts["documents"]:
        message = f"holds no trained token in {facts['documents']:,} documents ({described})"
        hint = (
            "conversations need turns of the assistant; data.mask_inputs: false trains all tokens"
        )
    else:
        message = (
            f"leaves no sample ({described}): of {facts['documents']:,} documents "
            f"{facts['untrained']:,} have no trained token and {facts['long']:,} have more than "
            f"{facts['max_length']:,} tokens"
        )
        hint = "raise data.max_length, or set data.long_samples"
    raise RecipeError(Problem(message, place=place, hint=hint))
