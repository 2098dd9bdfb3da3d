"""A hash is remembered while nothing says that the file has changed, and never a moment longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import xxhash

from arctic_like.data import hashes
from arctic_like.errors import RunError

LONG_AGO = time.time() - 1000


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read through."""
    found: list[Path] = []
    read = hashes.read_through
    monkeypatch.setattr(hashes, "read_through", lambda path: found.append(path) or read(path))
    return found


@pytest.fixture
def settled(monkeypatch):
    """Every file counts as old: tests cannot set a ctime back."""
    monkeypatch.setattr(hashes, "_FRESH_SECONDS", -1e9)


def asked(root, path, *, verify=False):
    with hashes.remembered(root, verify=verify):
        return hashes.file_hash(path)


def test_read_once(tmp_path, reads, settled):
    file = tmp_path / "a.jsonl"
    file.write_text("content")
    expected = xxhash.xxh3_128_hexdigest(b"content")
    assert [asked(tmp_path, file) for _ in range(3)] == [expected] * 3
    assert len(reads) == 1
    assert asked(tmp_path, file, verify=True) == expected
    assert len(reads) == 2
    assert hashes.file_hash(file) == expected  # without a memory
    assert len(reads) == 3


def test_read_again_when_anything_of_it_changes(tmp_path, reads, settled):
    file = tmp_path / "a.jsonl"
    file.write_text("first")
    first = asked(tmp_path, file)
    stat = file.stat()
    file.write_text("other")  # as long as before
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and said to be as old
    assert asked(tmp_path, file) != first
    (tmp_path / "b.jsonl").write_text("third")
    os.replace(tmp_path / "b.jsonl", file)
    assert asked(tmp_path, file) == xxhash.xxh3_128_hexdigest(b"third")
    assert len(reads) == 3


@pytest.mark.parametrize(("content", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\n\nb", 3)])
def test_lines_are_remembered_too(tmp_path, settled, content, lines):
    (tmp_path / "a").write_bytes(content)
    assert hashes.line_count(tmp_path / "a") is None
    for _ in range(2):
        with hashes.remembered(tmp_path, verify=False):
            assert hashes.line_count(tmp_path / "a") is None
            hashes.file_hash(tmp_path / "a")
            assert hashes.line_count(tmp_path / "a") == lines


def test_another_path_is_another_file(tmp_path, reads, settled):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        assert asked(tmp_path, tmp_path / name) == xxhash.xxh3_128_hexdigest(name.encode())
    assert len(reads) == 2


def test_what_changed_just_now_is_not_remembered(tmp_path, reads):
    file = tmp_path / "a.jsonl"
    file.write_text("content")
    asked(tmp_path, file)
    asked(tmp_path, file)
    assert len(reads) == 2
    assert not (tmp_path / "hashes").exists()


def test_what_changes_while_it_is_hashed_is_not_remembered(tmp_path, monkeypatch, settled):
    file = tmp_path / "a.jsonl"
    file.write_text("before")

    def read(path):
        file.write_text("after, and longer")
        return hashes.Content("torn", 1)

    monkeypatch.setattr(hashes, "read_through", read)
    assert asked(tmp_path, file) == "torn"
    monkeypatch.undo()
    monkeypatch.setattr(hashes, "_FRESH_SECONDS", -1e9)
    assert asked(tmp_path, file) == xxhash.xxh3_128_hexdigest(b"after, and longer")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"path": "elsewhere", "xxh3_128": "x"}'])
def test_a_broken_memory_is_none(tmp_path, reads, settled, content):
    file = tmp_path / "a.jsonl"
    file.write_text("content")
    expected = asked(tmp_path, file)
    (note,) = (tmp_path / "hashes").iterdir()
    note.write_text(content)
    assert asked(tmp_path, file) == expected
    assert len(reads) == 2


def test_changes_since_it_was_hashed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("content")
    with hashes.remembered(tmp_path, verify=False):
        hashes.file_hash(file)
        hashes.refuse_changes()
        file.write_text("other content")
        with pytest.raises(RunError, match=r"a\.jsonl was changed while it was prepared"):
            hashes.refuse_changes()
        hashes.forget_seen()
        hashes.refuse_changes()
        hashes.file_hash(file)
        file.unlink()
        with pytest.raises(RunError, match="was changed"):
            hashes.refuse_changes()
