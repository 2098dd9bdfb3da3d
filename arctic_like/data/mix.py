"""Several sources in one training set: how often each is drawn, and which of them a token is from.

`draws` is pure arithmetic; `order.MixedPlan` turns its numbers into an order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from arctic_like.data.base import Sample, SampleSet
from arctic_like.errors import Problem, RecipeError

if TYPE_CHECKING:
    from arctic_like.data.base import DataConfig, SourceConfig
    from arctic_like.data.documents import Documents
    from arctic_like.data.order import MixedPlan
    from arctic_like.data.prepare import Prepared
    from arctic_like.data.samples import DocumentSamples


def is_mixed(sources: Sequence[SourceConfig]) -> bool:
    """Whether an epoch is something else than every sample once."""
    return any(source.weight is not None or source.repeat != 1 for source in sources)


def stated_weights(sources: Sequence[SourceConfig]) -> tuple[float, ...] | None:
    """The weights of the sources, None where they have none. All have one, or none."""
    found = [source.weight for source in sources if source.weight is not None]
    return tuple(found) if found else None


def titles(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """A name for each source; those that share one are numbered: "train.jsonl", "train.jsonl#2"."""
    seen: Counter[str] = Counter()
    named = []
    for source in sources:
        seen[source.title] += 1
        number = seen[source.title]
        named.append(source.title if number == 1 else f"{source.title}#{number}")
    return tuple(named)


def draws(
    sizes: Sequence[int], *, repeats: Sequence[float], weights: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None, until_all: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """Samples that one epoch draws from each source.

    sizes: samples of each. repeats: passes of each that an epoch is to hold. Without weights that is
    all. weights: shares of the draws; with `tokens`, those in each source, shares of the tokens. The
    epoch is then as long as no source is drawn more often than `repeats` says, or with `until_all`
    as short as each is drawn so often. Shares are exact to one sample (largest remainders).
    """
    passes = [_exact(repeat) * size for repeat, size in zip(repeats, sizes, strict=True)]
    if weights is None:
        return tuple(max(1, round(wanted)) for wanted in passes)
    parts = [_exact(weight) for weight in weights]
    if tokens is not None:
        # so many samples give one token's share
        parts = [p * n / t for p, n, t in zip(parts, sizes, tokens, strict=True)]
    shares = [part / sum(parts) for part in parts]
    lengths = [wanted / share for wanted, share in zip(passes, shares, strict=True)]
    total = -int(-max(lengths) // 1) if until_all else max(1, int(min(lengths)))
    return _apportioned(total, shares)


def _exact(number: float) -> Fraction:
    # 0.7 as 7/10, not as the nearest binary fraction: 7 samples of 10 are then exactly its share
    return Fraction(repr(float(number)))


def _apportioned(total: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """`total` in whole parts after exact shares: Hamilton's method, ties to the first."""
    exact = [total * share for share in shares]
    parts = [int(part) for part in exact]
    most = sorted(range(len(parts)), key=lambda one: parts[one] - exact[one])
    for one in most[: total - sum(parts)]:
        parts[one] += 1
    return tuple(parts)


@dataclass(frozen=True)
class Mixture:
    """What an epoch draws from each source. tokens: in all samples of the source, drawn or not."""

    titles: tuple[str, ...]
    sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    draws: tuple[int, ...]

    def plan(self, global_batch_size: int, *, seed: int, drop_last: bool) -> MixedPlan:
        """The order of its samples. With `drop_last` an epoch is cut to whole global batches, its
        shares kept; what an epoch leaves out comes in the next. Raises RecipeError for an epoch that
        does not fill one."""
        from arctic_like.data.order import MixedPlan

        drawn = self.draws
        if drop_last:
            total = sum(drawn)
            whole = total // global_batch_size * global_batch_size
            if not whole:
                raise RecipeError(
                    f"data.drop_last leaves nothing to train on: an epoch's {total} samples do not "
                    f"fill one global batch of {global_batch_size}; set data.drop_last: false"
                )
            drawn = _apportioned(whole, [Fraction(one, total) for one in drawn])
        return MixedPlan(self.sizes, drawn, global_batch_size, seed)

    def facts(self) -> list[dict[str, Any]]:
        """Of each source: title, samples, draws, passes, and its shares of samples and tokens."""
        drawn_tokens = [
            tokens * drawn / size
            for tokens, drawn, size in zip(self.tokens, self.draws, self.sizes, strict=True)
        ]
        return [
            {
                "title": title,
                "samples": size,
                "draws": drawn,
                "passes": drawn / size,
                "sample_share": drawn / sum(self.draws),
                "token_share": tokens / sum(drawn_tokens),
            }
            for title, size, drawn, tokens in zip(
                self.titles, self.sizes, self.draws, drawn_tokens, strict=True
            )
        ]

    def report(self) -> str:
        """A line for the epoch and one for each source."""
        lines = [f"mix: {sum(self.draws):,} samples an epoch"]
        for one in self.facts():
            lines.append(
                f"  {one['title']}: {one['draws']:,} samples ({one['sample_share']:.1%}), "
                f"{one['token_share']:.1%} of the tokens, {one['passes']:.2f} passes"
            )
        return "\n".join(lines)


def mixture(config: DataConfig, sets: Sequence[SampleSet]) -> Mixture:
    """What an epoch draws from the sets of `config.sources`. Raises RecipeError for a source without
    a sample, and for one that would not be drawn at all."""
    names = titles(config.sources)
    for number, (name, one) in enumerate(zip(names, sets, strict=True)):
        if not len(one):
            raise RecipeError(
                Problem(
                    f"({name}) leaves no sample to mix", place=f"data.sources.{number}",
                    hint="raise data.max_length, look at its rows with `arctic-train inspect`, or "
                    "leave the source out",
                )
            )  # fmt: skip
    sizes = tuple(len(one) for one in sets)
    tokens = tuple(int(one.lengths.sum()) for one in sets)
    drawn = draws(
        sizes,
        repeats=[source.repeat for source in config.sources],
        weights=stated_weights(config.sources),
        tokens=tokens if config.mix_by == "token" else None,
        until_all=config.mix_until == "all_exhausted",
    )
    for number, (name, count) in enumerate(zip(names, drawn, strict=True)):
        if not count:
            raise RecipeError(
                Problem(
                    f"is so small a share that an epoch of {sum(drawn):,} samples has none of {name}",
                    place=f"data.sources.{number}.weight",
                    hint="raise it, or set data.mix_until: all_exhausted",
                )
            )
    return Mixture(names, sizes, tokens, drawn)


class JoinedSamples(SampleSet):
    """Several sets, one after another."""

    def __init__(self, sets: Sequence[SampleSet]) -> None:
        self.sets = list(sets)
        self.lengths = np.concatenate([one.lengths for one in sets])
        self.weights = np.concatenate([one.weights for one in sets])
        self._firsts = [0, *accumulate(len(one) for one in sets)]

    def __getstate__(self) -> dict[str, object]:
        return {"sets": self.sets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["sets"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self._firsts[-1]

    def _where(self, index: int) -> tuple[SampleSet, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = bisect_right(self._firsts, index) - 1
        return self.sets[part], index - self._firsts[part]

    def __getitem__(self, index: int) -> Sample:
        part, inside = self._where(index)
        return part[inside]

    def sample_id(self, index: int) -> str:
        """As the sample's own set names it."""
        part, inside = self._where(index)
        return part.sample_id(inside)

    def places(self, index: int) -> list[str]:
        """As the sample's own set names them."""
        part, inside = self._where(index)
        return part.places(inside)

    def entries(self) -> list[Path]:
        """Those of all sets."""
        return [entry for one in self.sets for entry in one.entries()]

    @property
    def documents(self) -> list[Documents]:
        """The documents of all sets."""
        return [part for one in self.sets for part in cast("Any", one).documents]


def joined(parts: Sequence[Prepared]) -> Prepared:
    """Sets that were prepared one by one, as one: facts that are counts added up, lists joined."""
    from arctic_like.data.prepare import Prepared

    facts: dict[str, Any] = {}
    for part in parts:
        for name, value in part.facts.items():
            if name not in facts or isinstance(value, str):
                facts[name] = value
            elif isinstance(value, (int, list)) and not isinstance(value, bool):
                facts[name] = facts[name] + value
    facts["max_length"] = parts[0].facts["max_length"]
    room = sum(one.facts["tokens"] / one.facts["fill_rate"] for one in parts if one.facts["tokens"])
    facts["fill_rate"] = facts["tokens"] / room if room else 0.0
    samples = JoinedSamples([part.samples for part in parts])
    return Prepared(cast("DocumentSamples", samples), facts)


class SourcedSamples(SampleSet):
    """Samples with `source_ids`: the source of each token.

    samples: made of documents. sources: the number of the source that each of their folders of
    documents is of.
    """

    def __init__(self, samples: DocumentSamples, sources: Sequence[int]) -> None:
        self.samples = samples
        self.sources = np.asarray(sources, dtype=np.int64)
        self.lengths, self.weights = samples.lengths, samples.weights
        self._ends = np.cumsum([len(part) for part in samples.documents])

    def __getstate__(self) -> dict[str, object]:
        return {"samples": self.samples, "sources": self.sources}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        pieces = slice(self.samples.offsets[index], self.samples.offsets[index + 1])
        documents = self.samples.pieces.document[pieces]
        owner = self.sources[np.searchsorted(self._ends, documents, side="right")]
        sample["source_ids"] = np.repeat(owner, self.samples.pieces.length[pieces])
        return sample

    def sample_id(self, index: int) -> str:
        """As without sources."""
        return self.samples.sample_id(index)

    def places(self, index: int) -> list[str]:
        """As without sources."""
        return self.samples.places(index)

    def entries(self) -> list[Path]:
        """As without sources."""
        return self.samples.entries()

    @property
    def documents(self) -> list[Documents]:
        """As without sources."""
        return self.samples.documents


def with_sources(samples: SampleSet, count: int) -> SampleSet:
    """The training samples of `count` sources, each token with the number of its source."""
    if isinstance(samples, JoinedSamples):
        parts = cast("list[DocumentSamples]", samples.sets)
        return JoinedSamples([SourcedSamples(part, [number]) for number, part in enumerate(parts)])
    return SourcedSamples(cast("DocumentSamples", samples), range(count))
