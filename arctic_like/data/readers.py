"""Rows of files, one reader a format. What is wrong with a row is a `BadRow` in its place and the
reader goes on; what is wrong with the file as a whole is a RecipeError.

A reader yields (mark, number, row): numbers count from 1 and are lines where the format has lines;
a mark is JSON, and given back it makes the reader go on after the row.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from arctic_like.data.base import BadRow
from arctic_like.data.files import COMPRESSED, DataFile
from arctic_like.errors import Problem, RecipeError

Mark = Any
Numbered = tuple[Mark, int, dict[str, Any] | BadRow]
Reader = Callable[..., Iterator[Numbered]]


def broken(file: DataFile, number: int | None, message: str, hint: str = "") -> RecipeError:
    """An error of a whole file, at a line if it has one."""
    return RecipeError(Problem(message, file=file.location, line=number, hint=hint))


def _bad(file: DataFile, number: int, message: str) -> BadRow:
    return BadRow(f"{file.name}:{number}", message, file=file.location, line=number)


def _lines(file: DataFile, bytes_: BinaryIO, mark: Mark) -> Iterator[tuple[list[int], int, bytes]]:
    """([bytes, lines] so far, number, line), cut at \\n only (JSON strings may hold other
    separators); a mark at the start of UTF-8 is left out."""
    offset, number = mark or (0, 0)
    if offset and bytes_.seekable():
        bytes_.seek(offset)
    elif offset:
        for skipped in bytes_:
            offset -= len(skipped)
            if offset <= 0:
                break
        offset = mark[0]
    for line in bytes_:
        offset += len(line)
        number += 1
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise broken(file, None, "is text in UTF-16; expected is UTF-8", "save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield [offset, number], number, line


def _encoding(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte 0x{error.object[error.start]:02x}); expected is text in UTF-8"


def jsonl(file: DataFile, *, mark: Mark = None) -> Iterator[Numbered]:
    """One JSON object a line; blank lines are passed over."""
    with file.open() as opened:
        for after, number, line in _lines(file, opened, mark):
            if line.isspace() or not line:
                continue
            row: dict[str, Any] | BadRow
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                row = _bad(file, number, _encoding(error))
            except (ValueError, RecursionError) as error:
                row = _bad(file, number, _not_json(line, error))
            else:
                if not isinstance(row, dict):
                    expected = "is not a JSON object; expected is one object a line"
                    row = _bad(file, number, expected)
            yield after, number, row


def _not_json(line: bytes, error: Exception) -> str:
    start, end = line[:120].decode(errors="replace"), line[-100:].decode(errors="replace")
    shown = start.strip() if len(line) <= 60 else f"{start[:30]} … {end.strip()[-25:]}"
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
    return f"is not valid JSON ({reason}{where}): {shown}; expected is one JSON object a line"


def json_file(file: DataFile, *, mark: Mark = None) -> Iterator[Numbered]:
    """A list of objects, or an object whose only list is that; JSON lines are known by their
    look."""
    if _is_jsonl(file):
        yield from jsonl(file, mark=mark)
        return
    with file.open() as opened:
        try:
            content = json.loads(opened.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise broken(file, None, _encoding(error)) from None
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            message = f"is not valid JSON ({error}); expected is a list of objects"
            raise broken(file, line, message) from None
    if isinstance(content, dict):
        # `{"data": [row, …]}` wraps rows; `{"messages": […]}` is one
        wraps = len(content) == 1 and not content.keys() & _OF_A_ROW
        lists = [value for value in content.values() if isinstance(value, list)] if wraps else []
        content = lists[0] if lists else [content]
    if not isinstance(content, list):
        raise broken(file, None, "is neither a list of objects nor an object")
    for number, row in enumerate(content, 1):
        if number > (mark or 0):
            whole = isinstance(row, dict)
            yield number, number, row if whole else _bad(file, number, "is not a JSON object")


_OF_A_ROW = {"messages", "conversations", "conversation", "input_ids"}


def _is_jsonl(file: DataFile) -> bool:
    """Whether the first line is a whole object and another one follows."""
    with file.open() as opened:
        first = opened.readline().removeprefix(b"\xef\xbb\xbf")
        if not first.lstrip().startswith(b"{"):
            return False
        following = opened.readline()
        while following.isspace():
            following = opened.readline()
    try:
        json.loads(first)
    except ValueError:
        # a broken first line of several is a broken line, not a broken file
        return first.rstrip().endswith(b"}") and following.startswith(b"{")
    return following.startswith(b"{")


def csv_file(file: DataFile, *, mark: Mark = None, delimiter: str = "") -> Iterator[Numbered]:
    """A header line and one row a record; numbered by the line on which a record ends."""
    separator = delimiter or ("\t" if file.suffix == ".tsv" else ",")
    # a field is as long as a document may be
    csv.field_size_limit(1 << 30)
    with file.open() as opened:
        text = io.TextIOWrapper(opened, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next(reader, [])
            if (twice := [name for name in header if header.count(name) > 1]) or not _whole(header):
                what = f"names the column {twice[0]!r} twice" if twice else "is not UTF-8"
                raise broken(file, 1, what)
            for count, fields in enumerate(filter(None, reader), 1):
                if count > (mark or 0):
                    yield count, reader.line_num, _record(file, reader.line_num, header, fields)
        except csv.Error as error:
            raise broken(file, reader.line_num, f"is not valid CSV ({error})") from None
        finally:
            text.detach()  # the file is closed by whoever opened it


def _record(
    file: DataFile, number: int, header: list[str], fields: list[str]
) -> dict[str, Any] | BadRow:
    if len(fields) != len(header):
        has = f"has {len(fields)} fields, not the {len(header)} of its header"
        return _bad(file, number, has)
    if not _whole(fields):
        return _bad(file, number, "is not UTF-8; expected is text in UTF-8")
    return dict(zip(header, fields, strict=True))


def _whole(fields: list[str]) -> bool:
    """Whether all bytes could be decoded."""
    return not any("\udc80" <= c <= "\udcff" for f in fields if not f.isascii() for c in f)


def text_file(
    file: DataFile, *, mark: Mark = None, sample_by: str = "document"
) -> Iterator[Numbered]:
    """The file as one `text`; or each `paragraph` (blank lines between), or each `line`."""
    if sample_by not in ("document", "paragraph", "line"):
        raise RecipeError(f"kwargs.sample_by is {sample_by!r}; it is document, paragraph or line")
    block: list[bytes] = []
    first, after, at = 1, mark, mark
    with file.open() as opened:
        for after, number, line in _lines(file, opened, mark):
            between = sample_by != "document" and line.isspace()
            if between or (block and sample_by == "line"):
                if block:
                    yield at, first, _text(file, first, block, sample_by)
                block = []
            if not between:
                first = number if not block else first
                block.append(line)
            at = after
    if block:
        yield after, first, _text(file, first, block, sample_by)


def _text(file: DataFile, first: int, block: list[bytes], sample_by: str) -> Any:
    try:
        text = b"".join(block).decode()
    except UnicodeDecodeError as error:
        line = first + error.object[: error.start].count(b"\n")
        return _bad(file, line, _encoding(error))
    return {"text": text if sample_by == "document" else text.rstrip("\r\n")}


def parquet(file: DataFile, *, mark: Mark = None) -> Iterator[Numbered]:
    """Rows of a parquet file, a batch at a time; row groups before the mark are not read."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        with file.open() as opened, pq.ParquetFile(_seekable(opened)) as stored:
            number = 0
            groups: list[int] = []
            for group in range(stored.num_row_groups):
                rows = stored.metadata.row_group(group).num_rows
                if not groups and number + rows <= (mark or 0):
                    number += rows
                else:
                    groups.append(group)
            for batch in stored.iter_batches(batch_size=1024, row_groups=groups):
                for row in batch.to_pylist():
                    number += 1
                    if number > (mark or 0):
                        yield number, number, row
    except ArrowException as error:
        raise broken(file, None, f"cannot be read as parquet: {error}") from None


def arrow(file: DataFile, *, mark: Mark = None) -> Iterator[Numbered]:
    """Rows of an Arrow file (either IPC format), a batch at a time."""
    import pyarrow as pa

    number = 0
    with file.open() as opened:
        try:
            plain = file.local is not None and not file.compression
            source = (
                pa.memory_map(str(file.local))
                if plain
                else pa.PythonFile(_seekable(opened), mode="r")
            )
            for batch in _arrow_batches(source):
                if number + len(batch) <= (mark or 0):
                    number += len(batch)
                    continue
                for row in batch.to_pylist():
                    number += 1
                    if number > (mark or 0):
                        yield number, number, row
        except pa.ArrowException as error:
            raise broken(file, None, f"cannot be read as Arrow: {error}") from None


def _arrow_batches(source: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        opened = pa.ipc.open_file(source)
        yield from (opened.get_batch(index) for index in range(opened.num_record_batches))
    else:
        yield from stream


def _seekable(file: BinaryIO) -> BinaryIO:
    return file if file.seekable() else io.BytesIO(file.read())


READERS: dict[str, Reader] = {
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


def read(file: DataFile, options: dict[str, Any], *, mark: Mark = None) -> Iterator[Numbered]:
    """The rows of a file after a mark, by its suffix. options: `kwargs` of the source.

    Raises RecipeError for a format that is not known, and for options that its reader does not
    take.
    """
    reader = READERS.get(file.suffix)
    if reader is None:
        known = ", ".join(suffix.lstrip(".") for suffix in READERS)
        raise broken(
            file, None, f"cannot be read: {file.suffix or 'no suffix'} is no known format",
            f"known are {known}; also {', '.join(COMPRESSED)}",
        )  # fmt: skip
    taken = [name for name in inspect.signature(reader).parameters if name not in ("file", "mark")]
    if unknown := [name for name in options if name not in taken]:
        takes = f"takes {', '.join(taken)}" if taken else "takes none"
        raise RecipeError(
            Problem(f"has {unknown[0]!r}, which the reader of {file.suffix} does not know",
                    place="kwargs", file=file.location, hint=f"it {takes}")
        )  # fmt: skip
    return reader(file, mark=mark, **options)
