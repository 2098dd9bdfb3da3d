"""`data: {type: torch}`: any torch data set, map-style or iterable, in an order that a resume finds again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from arctic_like.config.base import Config, PartConfig
from arctic_like.config.values import HumanFloat, HumanInt
from arctic_like.data.base import DataFactory, PreparedData, SampleSet
from arctic_like.errors import Problem, RecipeError, RunError

if TYPE_CHECKING:
    from arctic_like.data.order import Plan

ENDLESS = 1 << 40
"""Samples that are said to be in a set that has no end."""


class DatasetConfig(Config):
    """A data set: its class, or a function that returns it."""

    aliases = {"class": "class_path"}

    class_path: str = Field(default="", min_length=1)
    """The class or function: a dotted path, or a name from the `code:` file. Also written `class`."""

    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Its arguments. `seed` and `output_dir` are filled in where it has them and the recipe does not
    state them."""


class TorchDataConfig(PartConfig):
    """`type: torch`: data sets of one's own."""

    type: str = "torch"
    """`torch`: any torch data set."""

    train: DatasetConfig | None = None
    """What to train on: map-style (`__len__`, `__getitem__`) or iterable (`__iter__`)."""

    evaluation: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Evaluation sets by name, map-style; `eval` is reported without its name."""

    test: dict[str, DatasetConfig] = Field(default_factory=dict)
    """Test sets by name, map-style; `test` is reported without its name."""

    train_eval_split: tuple[HumanFloat, HumanFloat] = (1.0, 0.0)
    """Shares of the training set to train on and to hold out as the evaluation set `eval`."""

    collate: str = ""
    """Function from a list of samples to a batch: a dotted path or a name from the `code:` file;
    torch's own (tensors stacked, nested as the samples are) unless given."""

    epoch_length: HumanInt | None = Field(default=None, ge=1)
    """Samples of an epoch, where it is not one pass: for endless data, or a set of one sample."""

    drop_last: bool = False
    """Leave out the short last global batch of each epoch."""

    dl_num_workers: HumanInt = Field(default=0, ge=0)
    """Processes on each rank that read samples ahead of time."""

    seed: HumanInt | None = None
    """Order of samples; the recipe's `seed` unless given."""


class TorchSamples(SampleSet):
    """A map-style data set as samples, all of one weight and length."""

    def __init__(self, dataset: Any, name: str, chosen: Any = None) -> None:
        import numpy as np

        self.dataset = dataset
        self.name = name
        self.chosen = chosen
        size = len(dataset) if chosen is None else len(chosen)
        self.lengths = self.weights = np.ones(size, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def _place(self, index: int) -> int:
        return int(index if self.chosen is None else self.chosen[index])

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self._place(index)]

    def sample_id(self, index: int) -> str:
        """The set's name and the number of the sample in it."""
        return f"{self.name}[{self._place(index)}]"


class IterableSamples(SampleSet):
    """An iterable data set as samples by number, which must be asked for in about ascending order.

    Every rank and worker iterates over the whole of it and keeps what it is asked for, so that which
    samples make up a global batch does not depend on them. It begins anew where it ends. A set with
    `seek(n)` is told to stand before its n-th sample, else samples are passed over; one with
    `set_epoch(n)` learns of every new pass.
    """

    KEPT = 4096

    def __init__(self, dataset: Any, name: str, size: int) -> None:
        import numpy as np

        self.dataset = dataset
        self.name = name
        # a view of one number: such a set has no lengths to be told
        self.lengths = self.weights = np.broadcast_to(np.ones(1, dtype=np.int64), (size,))
        self._restart()

    def _restart(self) -> None:
        self._at = 0
        self._pass = -1
        self._stream: Iterator[Any] | None = None
        self._kept: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "name": self.name, "size": len(self.lengths)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        index = int(index)
        if index in self._kept:
            return self._kept[index]
        if index < self._at:
            self._restart()
        if self._stream is None and index and hasattr(self.dataset, "seek"):
            self.dataset.seek(index)
            self._stream, self._at = iter(self.dataset), index
        while self._at <= index:
            self._kept[self._at] = self._next()
            self._at += 1
            self._kept.pop(self._at - self.KEPT, None)
        return self._kept[index]

    def _next(self) -> Any:
        for _ in range(2):
            if self._stream is None:
                self._pass += 1
                if hasattr(self.dataset, "set_epoch"):
                    self.dataset.set_epoch(self._pass)
                self._stream = iter(self.dataset)
            try:
                return next(self._stream)
            except StopIteration:
                self._stream = None
        raise RunError(f"the data set {self.name} gives no sample")

    def sample_id(self, index: int) -> str:
        """The set's name and how many samples came before."""
        return f"{self.name}, sample {index}"


class TorchDataFactory(DataFactory):
    """Data sets by their class; any nesting of tensors is a batch."""

    name = "torch"
    config_type = TorchDataConfig  # type: ignore[assignment]
    config: Any

    def problems(self) -> list[Problem]:
        """What can be seen before anything is imported."""
        config: TorchDataConfig = self.config
        found = []
        if config.train is None and not config.test:
            found.append(
                Problem("is needed", "data.train", "name a data set: {class: my.module.Digits}")
            )
        train, held_out = config.train_eval_split
        if min(train, held_out) < 0 or abs(train + held_out - 1) > 1e-9 or train == 0:
            found.append(
                Problem(f"is [{train}, {held_out}], not two shares that add up to 1",
                        "data.train_eval_split", "write [0.9, 0.1] to hold out a tenth")
            )  # fmt: skip
        if held_out and "eval" in config.evaluation:
            found.append(
                Problem("holds out samples although data.evaluation has `eval`",
                        "data.train_eval_split", "keep one of them")
            )  # fmt: skip
        return found

    def build(self, *, seed: int, output_dir: Path) -> PreparedData:  # type: ignore[override]
        """The sets, and what the training set publishes by `facts()` or in attributes of its own."""
        config: TorchDataConfig = self.config
        values = {"seed": seed, "output_dir": output_dir}
        evaluation: dict[str, SampleSet] = {
            name: self._map_style(one, f"data.evaluation.{name}", values)
            for name, one in config.evaluation.items()
        }
        test: dict[str, SampleSet] = {
            name: self._map_style(one, f"data.test.{name}", values)
            for name, one in config.test.items()
        }
        collate = self._collate()
        if config.train is None:
            first: Any = next(iter(test.values()))
            return PreparedData(None, evaluation, collate, _facts(first.dataset), test=test)
        dataset = _made(config.train, "data.train", values)
        facts = _facts(dataset)
        if not _is_map_style(dataset):
            return PreparedData(
                self._iterable(dataset), evaluation, collate, facts, test=test,
                plan=self._in_order,
            )  # fmt: skip
        train, held_out = _divided(dataset, config, seed)
        if held_out is not None:
            evaluation = {"eval": held_out, **evaluation}
        plan = None
        if config.epoch_length is not None:
            length = config.epoch_length
            plan = lambda batch: _virtual(len(train), length, batch, seed)  # noqa: E731
        report = f"train: {len(train):,} samples of {_title(config.train)}"
        return PreparedData(train, evaluation, collate, facts, report, test=test, plan=plan)

    def _map_style(self, one: DatasetConfig, place: str, values: dict[str, Any]) -> TorchSamples:
        dataset = _made(one, place, values)
        if not _is_map_style(dataset):
            raise RecipeError(
                Problem(f"is {_title(one)}, which has no __len__ and __getitem__", place,
                        "evaluation and test sets are map-style: each sample counts once")
            )  # fmt: skip
        return TorchSamples(dataset, _title(one))

    def _iterable(self, dataset: Any) -> IterableSamples:
        config: TorchDataConfig = self.config
        if not hasattr(dataset, "__iter__"):
            raise RecipeError(
                Problem(f"is {_title(config.train)}, which is no data set", "data.train",
                        "it needs __len__ and __getitem__, or __iter__")
            )  # fmt: skip
        if config.train_eval_split[1]:
            raise RecipeError(
                Problem("cannot divide an iterable data set", "data.train_eval_split",
                        "name a set of its own in data.evaluation")
            )  # fmt: skip
        return IterableSamples(dataset, _title(config.train), ENDLESS)

    def _in_order(self, global_batch_size: int) -> Plan:
        from arctic_like.data.endless import SequentialPlan

        return SequentialPlan(ENDLESS, self.config.epoch_length or ENDLESS, global_batch_size)

    def _collate(self) -> Callable[[list[Any]], Any]:
        if not self.config.collate:
            from torch.utils.data import default_collate

            return default_collate
        from arctic_like.registry.named import find_object

        found: Callable[[list[Any]], Any] = find_object(self.config.collate, place="data.collate")
        return found


def _is_map_style(dataset: Any) -> bool:
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _title(one: DatasetConfig | None) -> str:
    return one.class_path.rpartition(".")[2] if one else ""


def _made(one: DatasetConfig, place: str, values: Mapping[str, Any]) -> Any:
    """The data set that a config describes. Raises RecipeError for arguments that do not fit."""
    import inspect

    from arctic_like.registry.dotted import with_numbers
    from arctic_like.registry.named import find_object

    make = find_object(one.class_path, place=f"{place}.class")
    known = inspect.signature(make).parameters
    filled = {name: value for name, value in values.items() if name in known}
    arguments = {**filled, **{key: with_numbers(value) for key, value in one.kwargs.items()}}
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise RecipeError(
            Problem(f"do not fit {_title(one)}: {error}", f"{place}.kwargs",
                    f"it takes {', '.join(known) or 'none'}")
        ) from None  # fmt: skip
    return make(**arguments)


def _facts(dataset: Any) -> dict[str, Any]:
    """What a data set publishes for models, optimizers and schedulers to ask for by name."""
    facts: dict[str, Any] = {"samples": len(dataset)} if hasattr(dataset, "__len__") else {}
    return {**facts, **(dataset.facts() if hasattr(dataset, "facts") else {})}


def _divided(
    dataset: Any, config: TorchDataConfig, seed: int
) -> tuple[TorchSamples, TorchSamples | None]:
    import numpy as np

    from arctic_like.data.order import key_of, permute

    size, share = len(dataset), config.train_eval_split[1]
    if not share:
        return TorchSamples(dataset, _title(config.train)), None
    order = permute(np.arange(size), size=size, key=key_of(seed, 1))
    border = size - round(size * share)
    return tuple(  # type: ignore[return-value]
        TorchSamples(dataset, _title(config.train), np.sort(part))
        for part in (order[:border], order[border:])
    )


def _virtual(size: int, length: int, global_batch_size: int, seed: int) -> Plan:
    from arctic_like.data.endless import VirtualEpochPlan

    return VirtualEpochPlan(size, length, global_batch_size, seed)
