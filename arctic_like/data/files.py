"""Files of data, here or behind a URL, compressed or not: found, opened, told apart by content."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from arctic_like.data.splits import EVALUATION_SPLITS, names_of
from arctic_like.errors import Problem, RecipeError

COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffix → the format's name."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://.+")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
"""Protocol → the extra of this package that brings its driver."""
_IDENTITY = ("ETag", "etag", "md5Hash", "md5", "Content-MD5", "crc32c", "generation", "sha256")
"""What file systems say of a file's content, where they do."""


def is_url(name: str) -> bool:
    """Whether a name is a URL rather than a path or a name on the Hub."""
    return _URL.fullmatch(name) is not None


@dataclass(frozen=True)
class DataFile:
    """One file. location: a path, or a URL that fsspec can open with `options`."""

    location: str
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        """Its last part, for places: "train.jsonl"; of a URL without what follows a `?`."""
        path = self.location.partition("?")[0] if is_url(self.location) else self.location
        return path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        """What says its format: `.jsonl` of `train.jsonl.gz`."""
        path = Path(self.name)
        inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
        return inner.suffix.lower()

    @property
    def compression(self) -> str:
        """`.gz`, `.bz2`, `.xz`, `.zst`, or nothing."""
        last = Path(self.name).suffix.lower()
        return last if last in COMPRESSED else ""

    @property
    def local(self) -> Path | None:
        """Its path, if it is here."""
        return None if is_url(self.location) else Path(self.location)

    def key(self) -> str:
        """Changes exactly when the content does. Read through, unless it is known otherwise."""
        from arctic_like.data.cache import key_of
        from arctic_like.data.hashes import file_hash

        if self.local is not None:
            return file_hash(self.local)
        with _told(self):
            system, path = _file_system(self.location, self.options)
            known = {k: v for k, v in system.info(path).items() if k in _IDENTITY and v}
            if known:
                return key_of([self.location, sorted((k, str(v)) for k, v in known.items())])
            import xxhash

            digest = xxhash.xxh3_128()
            with system.open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            return str(digest.hexdigest())

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The bytes, decompressed. Raises RecipeError where it cannot be read, or is not whole."""
        with _told(self), self._raw() as raw, _unpacked(raw, self.compression) as file:
            yield file

    @contextmanager
    def _raw(self) -> Iterator[BinaryIO]:
        if self.local is not None:
            with self.local.open("rb") as file:
                yield file
            return
        system, path = _file_system(self.location, self.options)
        with system.open(path, "rb") as remote:
            yield cast(BinaryIO, io.BufferedReader(remote, 1 << 20))


@contextmanager
def _unpacked(raw: BinaryIO, compression: str) -> Iterator[BinaryIO]:
    if compression == ".gz":
        import gzip

        with gzip.GzipFile(fileobj=raw) as unzipped:
            yield cast(BinaryIO, unzipped)
    elif compression == ".bz2":
        import bz2

        with bz2.BZ2File(raw) as unpacked:
            yield cast(BinaryIO, unpacked)
    elif compression == ".xz":
        import lzma

        with lzma.LZMAFile(raw) as inflated:
            yield cast(BinaryIO, inflated)
    elif compression == ".zst":
        import pyarrow as pa

        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
            yield cast(BinaryIO, io.BufferedReader(_Stream(stream), 1 << 20))
    else:
        yield raw


class _Stream(io.RawIOBase):
    """A stream of pyarrow as Python's own kind."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


@contextmanager
def _told(file: DataFile) -> Iterator[None]:
    """What goes wrong while a file is read, as a sentence about it."""
    import lzma
    import zlib

    try:
        yield
    except RecipeError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        kind = COMPRESSED.get(file.compression, "compressed")
        raise _broken(file, f"is not a whole {kind} file ({error})") from None
    except OSError as error:
        if file.compression and error.errno is None and not isinstance(error, TimeoutError):
            kind = COMPRESSED[file.compression]
            raise _broken(file, f"is not a whole {kind} file ({error})") from None
        raise _broken(file, f"cannot be read: {error.strerror or error}") from None
    except Exception as error:
        # drivers of remote file systems raise what their libraries raise
        if file.local is None and not type(error).__module__.startswith(("pyarrow", "builtins")):
            raise _broken(file, f"cannot be read: {type(error).__name__}: {error}") from error
        raise


def _broken(file: DataFile, message: str) -> RecipeError:
    return RecipeError(Problem(message, file=file.location))


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """(file system, path in it) of a URL. Raises RecipeError where its driver is missing."""
    if found := url_problem(url):
        raise RecipeError(found)
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url, **options)
    return system, path


def url_problem(url: str) -> Problem | None:
    """What is wrong with a URL and can be seen without a network: no such protocol, no driver."""
    import importlib.util

    from fsspec.registry import known_implementations, registry

    protocol = url.partition("://")[0].lower()
    if protocol in registry or protocol == "file":
        return None
    if protocol not in known_implementations:
        known = "s3, gs, https, hf, file"
        return Problem(f"is {url!r}: {protocol} is no known protocol", place="name_or_path",
                       hint=f"known are {known} and the others of fsspec")  # fmt: skip
    driver = known_implementations[protocol]["class"].partition(".")[0]
    if driver == "fsspec":
        driver = {"http": "aiohttp", "https": "aiohttp"}.get(protocol, "fsspec")
    if importlib.util.find_spec(driver) is not None:
        return None
    extra = _EXTRAS.get(protocol)
    install = f"pip install 'arctic-like[{extra}]'" if extra else f"pip install {driver}"
    return Problem(f"is {url!r}, which needs the package {driver}", place="name_or_path",
                   hint=install)  # fmt: skip


def data_files(
    name: str, split: str = "", options: Mapping[str, Any] | None = None
) -> list[DataFile]:
    """The files that a path, a glob, a folder of data files or a URL of one of these names, sorted;
    none for anything else.

    In a folder, files named after a split (`train.jsonl`, `train-00000.parquet`, `train/…`) are that
    split; where none is named after any, all of them are `train`. Raises RecipeError for a folder
    without the split.
    """
    if is_url(name):
        return _remote_files(name, split, options or {})
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return [DataFile(str(path))]
    if path.is_dir() and not is_saved(path):
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return _of_split(name, {str(f.relative_to(path)): DataFile(str(f)) for f in inside}, split)
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        return [DataFile(match) for match in matches if Path(match).is_file()]
    return []


def _remote_files(url: str, split: str, options: Mapping[str, Any]) -> list[DataFile]:
    with _told(DataFile(url)):
        system, path = _file_system(url, options)
        if glob.has_magic(path) and not url.startswith("http"):
            return [
                DataFile(system.unstrip_protocol(p), options) for p in sorted(system.glob(path))
            ]
        if url.startswith("http") or not system.isdir(path):
            return [DataFile(url, options)]
        start = system._strip_protocol(path).rstrip("/") + "/"
        inside = {
            found.removeprefix(start): DataFile(system.unstrip_protocol(found), options)
            for found in sorted(system.find(path))
        }
    return _of_split(url, inside, split)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved the folder."""
    return any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json"))


def _of_split(folder: str, inside: dict[str, DataFile], split: str) -> list[DataFile]:
    """The files of a split. inside: path within the folder → file."""
    from arctic_like.data.readers import READERS

    split = split or "train"
    files = {path: file for path, file in inside.items() if file.suffix in READERS}

    def named(name: str) -> list[DataFile]:
        start = re.compile(rf"{re.escape(name)}([.\-_]|$)")
        return [file for path, file in files.items() if start.match(path.partition("/")[0])]

    for name in names_of(split):
        if own := named(name):
            return own
    unnamed = not any(named(name) for name in ("train", *EVALUATION_SPLITS))
    if split == "train" and unnamed and files:
        return list(files.values())
    held = ", ".join(list(files)[:5]) or "no data file"
    raise RecipeError(
        Problem(
            f"{folder} has no split {split!r}; it holds {held}",
            place="data.sources",
            hint="name a file, a glob, or another split",
        )
    )
