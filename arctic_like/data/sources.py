"""The built-in sources: local files, folders that `datasets` saved, and names on the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from arctic_like.data.base import DataSource, ReadRow, Row, SourceConfig, make_source, usable
from arctic_like.errors import Problem, RecipeError

EVALUATION_SPLITS = ("eval", "validation", "valid", "val", "dev", "test")
"""What the split `eval` may be called; the first that there is."""

_SPLIT = re.compile(r"(?P<name>.+):(?P<split>[A-Za-z_][\w.\-]*(?:\[[^\]]*\])?|\[[^\]]*\])")
_SLICE = re.compile(r"(?P<split>[^\[]*)(?:\[(?P<from>-?\d+%?)?:(?P<to>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Stretch:
    """A split and a stretch of it: `train[:10%]`. Bounds are rows, or shares where they end in
    %."""

    split: str
    start: str = ""
    stop: str = ""

    @classmethod
    def parse(cls, text: str) -> Stretch:
        """Raises RecipeError for what is not `split` or `split[from:to]`."""
        match = _SLICE.fullmatch(text)
        if match is None:
            raise RecipeError(
                Problem(
                    f"is {text!r}, not a split", place="split", hint="write train, or train[:1000]"
                )
            )
        return cls(match["split"], match["from"] or "", match["to"] or "")

    def rows(self, total: int) -> range:
        """The rows of a set of `total` that the stretch names; as Python slices do."""

        def bound(text: str) -> int | None:
            if not text:
                return None
            return round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)

        return range(total)[bound(self.start) : bound(self.stop)]


def stated_part(config: SourceConfig) -> tuple[str, Stretch]:
    """(name or path, part) as the recipe states them: `name:split[:n]` taken apart.

    Raises RecipeError where the name and `split` both state a split.
    """
    name, split = config.name_or_path, config.split
    match = _SPLIT.fullmatch(name)
    if match is None or Path(name).exists():
        return name, Stretch.parse(split)
    if split and split != match["split"]:
        raise RecipeError(
            Problem(
                f"is {split!r}, but name_or_path says {match['split']!r}",
                place="split",
                hint="keep one of them",
            )
        )
    return match["name"], Stretch.parse(match["split"])


def named_part(config: SourceConfig) -> tuple[str, Stretch]:
    """`stated_part` with the recipe's names of splits (`split_mapping`) replaced."""
    name, part = stated_part(config)
    mapped = config.split_mapping.get(part.split or "train", part.split)
    return name, Stretch(mapped, part.start, part.stop)


class HFSource(DataSource):
    """`type: huggingface`: a local file, glob or folder where there is one, else a name on the
    Hub."""

    name = "huggingface"
    config_type = SourceConfig
    config: SourceConfig

    hub: ClassVar[bool] = True
    """Whether a name that is no path here may be looked up on the Hub."""

    def problems(self) -> list[Problem]:
        """A path that is not there. Names on the Hub are looked up only when the data is prepared."""
        name = stated_part(self.config)[0]
        if not name:
            return [
                Problem("is needed", place="name_or_path", hint="name a file or a Hub data set")
            ]
        there = glob.glob(name, recursive=True) if glob.has_magic(name) else Path(name).exists()
        if there or (self.hub and not _looks_local(name)):
            return []
        return [
            Problem(
                f"is {name!r}, which does not exist", place="name_or_path", hint="check the path"
            )
        ]

    def rows(self) -> Iterator[ReadRow]:
        name, part = named_part(self.config)
        files = local_files(name, part.split)
        if files:
            yield from _stretch(lambda: self._file_rows(files), part)
        else:
            yield from _table_rows(self._table(name, part), Path(name).name)

    def content_key(self) -> str:
        from arctic_like.data.cache import file_hash, key_of

        name, part = named_part(self.config)
        files = local_files(name, part.split)
        bounds = [part.split, part.start, part.stop]
        if files:
            return key_of([bounds, [[path.name, file_hash(path)] for path in files]])
        table = self._table(name, part)
        stored = [Path(entry["filename"]) for entry in table.cache_files]
        picked = [] if table._indices is None else table._indices.column(0).to_pylist()
        return key_of([name, bounds, [file_hash(path) for path in stored], picked])

    def _file_rows(self, files: list[Path]) -> Iterator[ReadRow]:
        from arctic_like.data.readers import reader_of

        for path in files:
            reader = reader_of(path)
            if reader is None:
                raise RecipeError(
                    Problem(
                        f"cannot be read: {path.suffix or 'no suffix'} is no known format",
                        file=str(path),
                        hint="known are jsonl, json, csv, tsv, parquet, arrow, txt, md; also .gz",
                    )
                )
            try:
                for number, row in reader(path, **self.config.kwargs):
                    yield f"{path.name}:{number}", row
            except TypeError as error:
                if "keyword argument" not in str(error):
                    raise
                raise RecipeError(Problem(str(error), place="kwargs", file=str(path))) from None

    def _table(self, name: str, part: Stretch) -> Any:
        """A `datasets.Dataset`, from a folder that `save_to_disk` wrote or from the Hub."""
        import datasets

        folder = Path(name).expanduser()
        try:
            if _is_saved(folder):
                table = datasets.load_from_disk(str(folder), **self.config.kwargs)
            elif not self.hub or folder.exists() or not name or _looks_local(name):
                raise _no_such_data(name, hub=False)
            else:
                table = datasets.load_dataset(name, **self.config.kwargs)
        except (OSError, ValueError, ConnectionError) as error:
            raise _no_such_data(name, hub=self.hub, error=error) from error
        return _picked(table, part, name)


class FileSource(HFSource):
    """`type: file`: local files only; a name that is none is an error and never looked up."""

    name = "file"
    hub = False


class HFInstructSource(HFSource):
    """`type: huggingface_instruct`: rows are conversations; `role_mapping` says where they
    stand."""

    name = "huggingface_instruct"


class HFCausalSource(HFSource):
    """`type: huggingface_causal`: rows are texts; `column` says where they stand."""

    name = "huggingface_causal"


def local_files(name: str, split: str = "") -> list[Path]:
    """The files that a path, a glob or a folder of data files names, sorted; none for anything
    else.

    In a folder, files named after a split (`train.jsonl`, `train-00000.parquet`, `train/…`) are that
    split; where none is named after any, all of them are `train`. Raises RecipeError for a folder
    without the split.
    """
    from arctic_like.data.readers import reader_of

    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not _is_saved(path):
        found = sorted(file for file in path.rglob("*") if file.is_file() and reader_of(file))
        return _of_split(path, found, split or "train")
    if glob.has_magic(name):
        matches = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        return [file for file in matches if file.is_file()]
    return []


def _looks_local(name: str) -> bool:
    """Whether a name can only be a path, so that it is not looked up on the Hub."""
    from arctic_like.data.readers import reader_of

    start = name.startswith(("/", "./", "../", "~"))
    return start or glob.has_magic(name) or reader_of(Path(name)) is not None


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` saved the folder."""
    return any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json"))


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    def named(name: str) -> list[Path]:
        start = re.compile(rf"{re.escape(name)}([.\-_]|$)")
        return [file for file in files if start.match(file.relative_to(folder).parts[0])]

    for name in _names_of(split):
        if own := named(name):
            return own
    unnamed = not any(named(name) for name in ("train", *EVALUATION_SPLITS))
    if split == "train" and unnamed and files:
        return files
    held = ", ".join(str(file.relative_to(folder)) for file in files[:5]) or "no data file"
    raise RecipeError(
        Problem(
            f"{folder} has no split {split!r}; it holds {held}",
            place="data.sources",
            hint="name a file, a glob, or another split",
        )
    )


def _names_of(split: str) -> tuple[str, ...]:
    return EVALUATION_SPLITS if split == "eval" else (split,)


def _stretch(rows: Any, part: Stretch) -> Iterator[ReadRow]:
    """The rows that a part names; they are counted first only where a bound needs the total."""
    needs_total = any(
        bound.startswith("-") or bound.endswith("%") for bound in (part.start, part.stop)
    )
    total = sum(1 for _ in rows()) if needs_total else 1 << 62
    wanted = part.rows(total)
    for index, row in enumerate(rows()):
        if index >= wanted.stop:
            return
        if index >= wanted.start:
            yield row


def _picked(table: Any, part: Stretch, name: str) -> Any:
    if isinstance(table, dict):
        split = part.split or "train"
        split = next((known for known in _names_of(split) if known in table), split)
        if split not in table:
            raise RecipeError(
                Problem(
                    f"{name} has no split {split!r}, only {', '.join(table)}",
                    place="data.sources",
                    hint=f"write {name}:{next(iter(table), 'train')}, or use split_mapping",
                )
            )
        table = table[split]
    return table.select(part.rows(len(table))) if part.start or part.stop else table


def _table_rows(table: Any, name: str) -> Iterator[ReadRow]:
    for number, row in enumerate(table, 1):
        yield f"{name}:{number}", row


def _no_such_data(name: str, *, hub: bool, error: Exception | None = None) -> RecipeError:
    reason = f" ({str(error).splitlines()[0]})" if error is not None and str(error) else ""
    what = "neither a file here nor a data set that can be loaded" if hub else "not a file here"
    return RecipeError(
        Problem(
            f"{name!r} is {what}{reason}",
            place="data.sources",
            hint="give a path, a glob, a folder that `datasets` saved, or a Hub name",
        )
    )


def read_conversations(source: str | Path | SourceConfig) -> Iterator[Row]:
    """The raw rows of a source with their places, as they stand in the file: for a callback that
    generates from prompts, say. A bare path or name is read as the recipe reads one. Raises
    RecipeError at a row that cannot be read."""
    config = source if isinstance(source, SourceConfig) else SourceConfig(name_or_path=str(source))
    return usable(make_source(config).rows())
