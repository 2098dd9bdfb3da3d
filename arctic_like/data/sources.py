"""The built-in sources of files and data sets: paths, globs, folders, URLs, names on the Hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from arctic_like.config.base import wrong
from arctic_like.data.base import (
    BadRow,
    Cursor,
    DataSource,
    Followed,
    ReadRow,
    Row,
    SourceConfig,
    make_source,
    usable,
)
from arctic_like.data.columns import RowError, optional
from arctic_like.data.files import DataFile, data_files, is_saved, is_url, url_problem
from arctic_like.data.splits import Stretch, named_part, names_of, stated_part
from arctic_like.errors import Problem, RecipeError

_ROW_A_LINE = (".jsonl", ".ndjson", ".csv", ".tsv")
_STATE_EVERY = 256
"""Rows of a stream between two of its states; those after the last one are read again."""


class HFSource(DataSource):
    """`type: huggingface`: a local file, glob or folder where there is one, a URL, or else a name
    on the Hub."""

    name = "huggingface"
    config_type: ClassVar[type[SourceConfig]] = SourceConfig
    config: SourceConfig

    hub: ClassVar[bool] = True
    """Whether a name that is no path here may be looked up on the Hub."""

    def problems(self) -> list[Problem]:
        """A path that is not there, a URL that cannot be opened here. Names on the Hub are looked
        up only when the data is prepared."""
        name = stated_part(self.config)[0]
        if not name:
            hint = "name a file or a Hub data set"
            return [Problem("is needed", place="name_or_path", hint=hint)]
        if is_url(name):
            found = url_problem(name)
            return [found] if found else []
        there = glob.glob(name, recursive=True) if glob.has_magic(name) else Path(name).exists()
        if there or (self.hub and not _looks_local(name)):
            return []
        message = f"is {name!r}, which does not exist"
        return [Problem(message, place="name_or_path", hint="check the path")]

    def rows(self) -> Iterator[ReadRow]:
        name, part = named_part(self.config)
        files = self._files(name, part)
        if files:
            yield from ((place, row) for _, place, row in self._file_rows(files, part, None))
            return
        for number, row in enumerate(self._table(name, part), 1):
            yield f"{Path(name).name}:{number}", row

    def rows_from(self, cursor: Cursor | None = None) -> Iterator[Followed]:
        """See `DataSource.rows_from`. Files go on at the byte or the row group, saved data sets at
        the row; data sets on the Hub are streamed, not downloaded."""
        name, part = named_part(self.config)
        files = self._files(name, part)
        if files:
            yield from self._file_rows(files, part, cursor)
        elif Path(os.path.expanduser(name)).exists():
            table = self._table(name, part)
            done = cursor["rows"] if cursor else 0
            left = table.select(range(done, len(table))) if done < len(table) else ()
            for number, row in enumerate(left, done + 1):
                yield {"rows": number}, f"{Path(name).name}:{number}", row
        else:
            yield from self._stream(name, part, cursor)

    def expected_rows(self) -> int | None:
        """See `DataSource.expected_rows`: of files with a row a line, their lines."""
        from arctic_like.data.hashes import line_count

        name, part = named_part(self.config)
        lines = [
            line_count(file.local)
            if file.local and not file.compression and file.suffix in _ROW_A_LINE
            else None
            for file in self._files(name, part)
        ]
        known = [count for count in lines if count is not None]
        return len(part.rows(sum(known))) if known and len(known) == len(lines) else None

    def content_key(self) -> str:
        from arctic_like.data.cache import key_of
        from arctic_like.data.hashes import file_hash

        name, part = named_part(self.config)
        files = self._files(name, part)
        bounds = [part.split, part.start, part.stop]
        if files:
            return key_of([bounds, [[file.name, file.key()] for file in files]])
        table = self._table(name, part)
        stored = [Path(entry["filename"]) for entry in table.cache_files]
        if not stored:
            return super().content_key()  # a table in memory: known by its rows
        picked = [] if table._indices is None else table._indices.column(0).to_pylist()
        return key_of([name, bounds, [file_hash(path) for path in stored], picked])

    def _files(self, name: str, part: Stretch) -> list[DataFile]:
        return data_files(name, part.split, self.config.kwargs.get("storage_options"))

    def _file_rows(
        self, files: list[DataFile], part: Stretch, cursor: Cursor | None
    ) -> Iterator[Followed]:
        """cursor: `file` counts the files, `mark` is its reader's, `rows` are those of all files
        before it."""
        from arctic_like.data.readers import read

        options = {k: v for k, v in self.config.kwargs.items() if k != "storage_options"}
        total = 1 << 62
        if part.needs_total:
            total = sum(1 for file in files for _ in read(file, options))
        wanted = part.rows(total)
        at = cursor or {"file": 0, "mark": None, "rows": 0}
        passed = at["rows"]
        for index in range(at["file"], len(files)):
            file = files[index]
            mark = at["mark"] if index == at["file"] else None
            for after, number, row in read(file, options, mark=mark):
                if passed >= wanted.stop:
                    return
                passed += 1
                if passed > wanted.start:
                    here = {"file": index, "mark": after, "rows": passed}
                    yield here, f"{file.name}:{number}", row

    def _table(self, name: str, part: Stretch) -> Any:
        """A `datasets.Dataset`, from a folder that `save_to_disk` wrote or from the Hub."""
        folder = Path(os.path.expanduser(name))
        if is_saved(folder):
            table = self._loaded("load_from_disk", str(folder), self.config.kwargs)
        elif not self.hub or folder.exists() or not name or _looks_local(name):
            raise _no_such_data(name, hub=False)
        else:
            table = self._loaded("load_dataset", name, self._hub_arguments())
        return _picked(table, part, name)

    def _loaded(self, function: str, name: str, arguments: dict[str, Any]) -> Any:
        import datasets

        try:
            return getattr(datasets, function)(name, **arguments)
        except TypeError as error:
            raise RecipeError(
                Problem(f"does not fit {function}: {error}", place="kwargs")
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise _no_such_data(name, hub=self.hub, error=error) from error

    def _hub_arguments(self) -> dict[str, Any]:
        arguments = dict(self.config.kwargs)
        if arguments.pop("streaming", None):
            raise RecipeError(
                Problem("has streaming, which is not the source's to say", place="kwargs",
                        hint="set data.streaming: true")
            )  # fmt: skip
        if self.config.revision is not None:
            arguments["revision"] = self.config.revision
        return arguments

    def _stream(self, name: str, part: Stretch, cursor: Cursor | None) -> Iterator[Followed]:
        """cursor: `state` of the stream some rows back, `skip` those rows, `rows` all before it."""
        if not self.hub or not name or _looks_local(name):
            raise _no_such_data(name, hub=False)
        if part.needs_total:
            message = f"is {part.split}[{part.start}:{part.stop}], which needs the number of rows; "
            raise RecipeError(
                Problem(message + "a streamed data set does not say it", place="split",
                        hint="count rows from the start: train[:1000]")
            )  # fmt: skip
        arguments = {**self._hub_arguments(), "streaming": True}
        whole = Stretch(part.split)
        stream = _picked(self._loaded("load_dataset", name, arguments), whole, name)
        at = cursor or {"state": None, "skip": 0, "rows": 0}
        if at["state"] is not None:
            stream.load_state_dict(at["state"])
        state, wanted = at["state"], part.rows(1 << 62)
        passed = at["rows"] - at["skip"]
        base = passed
        for row in stream:
            if passed >= wanted.stop:
                return
            passed += 1
            if passed - base >= _STATE_EVERY:
                state, base = stream.state_dict(), passed
            if passed > max(at["rows"], wanted.start):
                here = {"state": state, "skip": passed - base, "rows": passed}
                yield here, f"{Path(name).name}:{passed}", row


class FileSource(HFSource):
    """`type: file`: files only, here or behind a URL; a name that is none is an error and never
    looked up."""

    name = "file"
    hub = False


class HFInstructSource(HFSource):
    """`type: huggingface_instruct`: rows are conversations; `role_mapping` says where they
    stand."""

    name = "huggingface_instruct"


class HFCausalSourceConfig(SourceConfig):
    """A source of texts."""

    type: str = "huggingface_causal"

    column_mapping: dict[str, str] = Field(default_factory=dict)
    """Name in `template` → column, or the turns of a list (`conversations.from.gpt`: the first)."""

    template: str = "{text}"
    """The text, from the names of `column_mapping`; `column` may be a template by itself."""

    @model_validator(mode="after")
    def _mapped(self) -> HFCausalSourceConfig:
        if self.column_mapping and self.column:
            raise wrong(
                "and column are both given", place="column_mapping", hint="keep one of them"
            )
        if not self.column_mapping and self.given("template") and self.template != "{text}":
            raise wrong(
                "names columns, but there is no column_mapping for them",
                place="template",
                hint='write `column: "{{ title }} {{ body }}"`, or give column_mapping',
            )
        try:
            self.template.format(**dict.fromkeys(self.column_mapping or ["text"], ""))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise wrong(
                f"is {self.template!r}, which column_mapping does not fill ({error})",
                place="template",
                hint="name in braces what column_mapping names",
            ) from None
        return self


class HFCausalSource(HFSource):
    """`type: huggingface_causal`: rows are texts; `column` says where they stand."""

    name = "huggingface_causal"
    config_type = HFCausalSourceConfig
    config: HFCausalSourceConfig

    def rows(self) -> Iterator[ReadRow]:
        return ((place, self._text(place, row)) for place, row in super().rows())

    def rows_from(self, cursor: Cursor | None = None) -> Iterator[Followed]:
        """See `HFSource.rows_from`."""
        for after, place, row in super().rows_from(cursor):
            yield after, place, self._text(place, row)

    def content_key(self) -> str:
        from arctic_like.data.cache import key_of

        config = self.config
        return key_of([super().content_key(), config.column_mapping, config.template])

    def _text(self, place: str, row: dict[str, Any] | BadRow) -> dict[str, Any] | BadRow:
        """The row with the text that `column_mapping` and `template` make of it."""
        if isinstance(row, BadRow) or not self.config.column_mapping:
            return row
        try:
            found = {n: _first(row, path) for n, path in self.config.column_mapping.items()}
        except RowError as error:
            return BadRow(place, str(error), error.hint)
        return {"text": self.config.template.format(**found)}


def _first(row: dict[str, Any], path: str) -> str:
    """The text at a path; of `list.field.value` the first turn's."""
    from arctic_like.data.columns import kind, value_at
    from arctic_like.data.messages import CONTENT_KEYS

    parts = path.rsplit(".", 2)
    listed = optional(row, parts[0]) if len(parts) == 3 else None
    if path not in row and isinstance(listed, list):
        for turn in listed:
            if isinstance(turn, dict) and str(turn.get(parts[1])) == parts[2]:
                for key in CONTENT_KEYS:
                    if isinstance(turn.get(key), str):
                        return str(turn[key])
        raise RowError(f"has no turn with {parts[1]} {parts[2]!r} in {parts[0]!r}")
    value = value_at(row, path)
    if not isinstance(value, str | int | float):
        raise RowError(f"has {kind(value)} in {path!r}; expected is text")
    return str(value)


def _looks_local(name: str) -> bool:
    """Whether a name can only be a path, so that it is not looked up on the Hub."""
    from arctic_like.data.readers import READERS

    start = name.startswith(("/", "./", "../", "~"))
    return start or glob.has_magic(name) or DataFile(name).suffix in READERS


def _picked(table: Any, part: Stretch, name: str) -> Any:
    if isinstance(table, dict):
        split = part.split or "train"
        split = next((known for known in names_of(split) if known in table), split)
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


__all__ = [
    "FileSource", "HFCausalSource", "HFInstructSource", "HFSource", "Stretch", "read_conversations",
    "stated_part",
]  # fmt: skip
