"""Rows of files, one reader a format. Every error names the file, the line and what is expected.

A reader yields (number, row); numbers count from 1 and are lines where the format has lines.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arctic_like.errors import Problem, RecipeError

Numbered = tuple[int, dict[str, Any]]


def broken(path: Path, number: int | None, message: str, hint: str = "") -> RecipeError:
    """An error at a line of a file."""
    return RecipeError(Problem(message, file=str(path), line=number, hint=hint))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file's bytes, decompressed where its name ends in .gz."""
    with path.open("rb") as file:
        if path.suffix != ".gz":
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            try:
                yield unpacked
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise broken(path, None, f"is not a whole gzip file ({error})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, cut at \\n only (JSON strings may hold other separators)."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise broken(path, number, _encoding(error)) from None


def _encoding(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); expected is text in UTF-8"


def jsonl(path: Path) -> Iterator[Numbered]:
    """One JSON object a line; blank lines are passed over."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise broken(path, number, _not_json(line, error)) from None
        if not isinstance(row, dict):
            raise broken(path, number, "is not a JSON object; expected is one object a line")
        yield number, row


def _not_json(line: str, error: Exception) -> str:
    shown = line.strip()
    shown = shown if len(shown) <= 60 else f"{shown[:30]} … {shown[-25:]}"
    return f"is not valid JSON ({error}): {shown}; expected is one JSON object a line"


def json_file(path: Path) -> Iterator[Numbered]:
    """A list of objects, or an object whose only list is that; JSON lines are known by their
    look."""
    with _opened(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise broken(path, None, _encoding(error)) from None
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            yield from jsonl(path)
            return
        line = getattr(error, "lineno", None)
        raise broken(
            path, line, f"is not valid JSON ({error}); expected is a list of objects"
        ) from None
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 and len(content) == 1 else [content]
    if not isinstance(content, list):
        raise broken(path, None, "is neither a list of objects nor an object")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise broken(path, None, f"has an entry {number} that is not an object")
        yield number, row


def csv_file(path: Path, *, delimiter: str = "") -> Iterator[Numbered]:
    """A header line and one row a record; numbered by the line on which a record ends."""
    import csv

    separator = delimiter or ("\t" if ".tsv" in path.name else ",")
    with _opened(path) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
        # a field is as long as a document may be
        csv.field_size_limit(1 << 30)
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise broken(
                        path,
                        reader.line_num,
                        f"has not the {len(reader.fieldnames or [])} fields of its header",
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise broken(path, reader.line_num, f"is not valid CSV ({error})") from None
        except UnicodeDecodeError as error:
            raise broken(path, reader.line_num + 1, _encoding(error)) from None


def text_file(path: Path, *, sample_by: str = "document") -> Iterator[Numbered]:
    """The file as one `text`; or each `paragraph` (blank lines between), or each `line`."""
    if sample_by == "line":
        for number, line in _lines(path):
            if line.strip():
                yield number, {"text": line.rstrip("\r\n")}
        return
    if sample_by not in ("document", "paragraph"):
        raise RecipeError(f"kwargs.sample_by is {sample_by!r}; it is document, paragraph or line")
    block: list[str] = []
    first = 1
    for number, line in _lines(path):
        if sample_by == "paragraph" and not line.strip():
            if block:
                yield first, {"text": "".join(block).rstrip("\r\n")}
            block = []
            continue
        if not block:
            first = number
        block.append(line)
    if block:
        yield (
            first,
            {"text": "".join(block) if sample_by == "document" else "".join(block).rstrip("\r\n")},
        )


def parquet(path: Path) -> Iterator[Numbered]:
    """Rows of a parquet file, a batch at a time."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except ArrowException as error:
        raise broken(path, None, f"cannot be read as parquet: {error}") from None


def arrow(path: Path) -> Iterator[Numbered]:
    """Rows of an Arrow file (either IPC format), a batch at a time."""
    import pyarrow as pa

    number = 0
    with pa.memory_map(str(path)) as source:
        try:
            for batch in _arrow_batches(source):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except pa.ArrowException as error:
            raise broken(path, None, f"cannot be read as Arrow: {error}") from None


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        opened = pa.ipc.open_file(source)
        yield from (opened.get_batch(index) for index in range(opened.num_record_batches))
    else:
        yield from stream


READERS: dict[str, Callable[..., Iterator[Numbered]]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": csv_file,
    ".txt": text_file,
    ".md": text_file,
    ".parquet": parquet,
    ".arrow": arrow,
}


def reader_of(path: Path) -> Callable[..., Iterator[Numbered]] | None:
    """The reader for a file's suffix (`.gz` aside), or None."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return READERS.get(suffix.lower())
