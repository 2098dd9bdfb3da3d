"""`arctic-train cache`: what it lists, and that it removes what was asked for and nothing else."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from arctic_like.cli import cache as command
from arctic_like.cli.main import main
from arctic_like.cli.quantities import age, count, parse_age, size
from arctic_like.data import cache, inventory
from arctic_like.data.cache import VERSION

OLD, NEW, SAMPLES, LEFT, BUSY, OTHER = (
    "a1" * 16,
    "a2" * 16,
    "b1" * 16,
    "c1" * 16,
    "d1" * 16,
    "e1" * 16,
)
DAY = 86400


@pytest.fixture
def root(tmp_path):
    """A cache with an entry of each kind: old and new documents, samples, what a killed process left,
    what another version wrote, and something that is not the cache's."""
    folder = tmp_path / "cache"

    def entry(kind: str, key: str, used: float, **facts) -> None:
        def fill(path: Path) -> dict:
            (path / "tokens.bin").write_bytes(b"x" * 50_000)
            return facts

        made = cache.obtain(folder / kind, key, fill)
        os.utime(made, (used, used))

    now = time.time()
    entry("documents", OLD, now - 40 * DAY, source="a/very/long/path/" * 4 + "old.jsonl",
          documents=12_345, tokens=2_110_000)  # fmt: skip
    entry("documents", NEW, now - 3 * 3600, source="new.jsonl", documents=7, tokens=90)
    entry("samples", SAMPLES, now - 60, documents=7, tokens=90, sources=[{"title": "new.jsonl"}])
    entry("documents", OTHER, now - 60, version=VERSION + 1, source="other.jsonl")
    left = folder / "documents" / f"{LEFT}.tmp-elsewhere-1"
    left.mkdir()
    (left / "tokens.bin").write_bytes(b"x" * 10_000)
    for path in (left / "tokens.bin", left):
        os.utime(path, (now - DAY, now - DAY))
    (folder / "documents" / f"{LEFT}.error").write_text("{}")
    (folder / "samples" / "notes").mkdir()
    return folder


@pytest.fixture
def busy(root):
    """An entry that a process is preparing."""
    entry = root / "documents" / f"{BUSY}.tmp-here-2"
    entry.mkdir()
    with (root / "documents" / f"{BUSY}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield BUSY


def keys(root: Path) -> set[str]:
    return {entry.key for entry in inventory.entries(root)}


def on_disk(root: Path) -> set[str]:
    """Everything but lock files, read without the package."""
    return {str(path.relative_to(root)) for path in root.glob("*/*") if path.suffix != ".lock"}


def test_the_listing(root, busy, capsys):
    assert main(["cache", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == str(root)
    assert all(len(line) <= 80 for line in lines[1:])
    row = {line.split()[0]: line for line in lines if line.startswith("  ")}
    assert len(row) == 7
    assert row[OLD[:8]].split()[-5:] == ["2.11M", size(disk(root / "documents" / OLD)).split()[0],
                                         "kB", "40", "d"]  # fmt: skip
    assert "old.jsonl" in row[OLD[:8]]
    assert "12.3k" in row[OLD[:8]]
    assert row[NEW[:8]].split()[1] == "new.jsonl"
    assert row[NEW[:8]].endswith("3 h")
    assert row[SAMPLES[:8]].split()[1] == "new.jsonl"
    assert "incomplete" in row[LEFT[:8]]
    assert "being prepared" in row[BUSY[:8]]
    assert f"(version {VERSION + 1})" in row[OTHER[:8]]
    assert "not the cache's" in row["notes"]
    assert lines[-1] == f"7 entries, {size(disk(*root.glob('*/*')))}"


def disk(*folders: Path) -> int:
    """What `du` counts, but for lock files."""
    return sum(
        path.lstat().st_blocks * 512
        for folder in folders
        for path in [folder, *folder.rglob("*")]
        if path.suffix != ".lock"
    )


def test_nothing_prepared(tmp_path, capsys):
    assert main(["cache", "--root", str(tmp_path / "none")]) == 0
    assert "no prepared data" in capsys.readouterr().out
    assert main(["cache", "remove", "--all", "--yes", "--root", str(tmp_path)]) == 0
    assert "no such entry" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        ([OLD], {OLD}),
        (["a2", "b1b1"], {NEW, SAMPLES}),
        ([f"documents/{LEFT[:5]}"], {LEFT}),
        (["--older-than", "30d"], {OLD}),
        (["--older-than", "2 h"], {OLD, NEW}),
        (["--unused"], {LEFT, OTHER}),
        (["--all"], {OLD, NEW, SAMPLES, LEFT, OTHER}),
    ],
)
def test_what_is_removed(root, busy, capsys, words, gone):
    before = keys(root)
    assert main(["cache", "--root", str(root), "remove", *words, "--yes"]) == 0
    assert before - keys(root) == gone
    left = " ".join(on_disk(root))
    assert not any(key in left for key in gone)
    assert (root / "samples" / "notes").is_dir()
    assert f"removed {len(gone)} of {len(gone)} entries" in capsys.readouterr().out


def test_an_entry_that_is_being_prepared_stays(root, busy, capsys):
    before = on_disk(root)
    assert main(["cache", "remove", BUSY[:6], "--yes", "--root", str(root)]) == 1
    assert "prepares it right now" in capsys.readouterr().err
    assert on_disk(root) == before


def test_a_machine_whose_lock_does_not_reach_here_is_not_disturbed(root):
    entry = root / "documents" / f"{'f1' * 16}.tmp-elsewhere-7"
    entry.mkdir()
    (entry / "tokens.bin").write_bytes(b"x")
    (found,) = (one for one in inventory.entries(root) if one.key == "f1" * 16)
    assert found.state == "preparing"
    assert inventory.remove(root, found) is False
    assert (entry / "tokens.bin").exists()


def test_a_preparation_that_begins_meanwhile_is_not_disturbed(root):
    listed = {entry.key: entry for entry in inventory.entries(root)}
    with (root / "documents" / f"{LEFT}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = on_disk(root)
        assert inventory.remove(root, listed[LEFT]) is False
        assert on_disk(root) == before
    assert inventory.remove(root, listed[LEFT]) is True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ffff"], ["no entry's key begins with 'ffff'"]),
        (["a"], ["several keys", "a1a1", "a2a2", "write more"]),
        (["notes"], ["none of the cache's"]),
        ([], ["KEY", "--all"]),
        (["--all", "--unused"], ["one of"]),
        (["a1", "--all"], ["one of"]),
        (["--older-than", "soon"], ["30d", "'soon'"]),
    ],
)
def test_bad_commands_remove_nothing(root, capsys, words, expected):
    before = on_disk(root)
    assert main(["cache", "remove", *words, "--yes", "--root", str(root)]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in err
    for word in expected:
        assert word in err
    assert on_disk(root) == before


def test_without_yes_somebody_must_agree(root, capsys, monkeypatch):
    before = on_disk(root)
    monkeypatch.setattr(command, "is_interactive", lambda: False)
    assert main(["cache", "remove", "--all", "--root", str(root)]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(command, "is_interactive", lambda: True)
    monkeypatch.setattr("click.confirm", lambda _: False)
    assert main(["cache", "remove", "--all", "--root", str(root)]) == 0
    assert on_disk(root) == before
    monkeypatch.setattr("click.confirm", lambda _: True)
    assert main(["cache", "remove", "a1", "--root", str(root)]) == 0
    assert keys(root) == {NEW, SAMPLES, LEFT, OTHER, "notes"}


def test_what_is_used_is_not_old(root):
    cache.obtain(root / "documents", OLD, lambda _: {})
    assert main(["cache", "remove", "--older-than", "30d", "--yes", "--root", str(root)]) == 0
    assert OLD in keys(root)


def test_an_entry_that_was_removed_is_prepared_again(root):
    main(["cache", "remove", OLD, "--yes", "--root", str(root)])
    made = cache.obtain(root / "documents", OLD, lambda _: {"documents": 1})
    assert cache.facts(made) == {"documents": 1}


def test_numbers_for_people():
    assert [size(n) for n in (0, 999, 1000, 9_949, 9_950, 13_400_000, 999_600)] == [
        "0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "13 MB", "1.0 MB",
    ]  # fmt: skip
    assert [count(n) for n in (0, 9_999, 12_345, 2_110_000, 999_600)] == [
        "0", "9,999", "12.3k", "2.11M", "1M",
    ]  # fmt: skip
    assert [age(n) for n in (-1, 59, 60, 7199, 7200, 40 * DAY)] == [
        "0 s", "59 s", "1 min", "1 h", "2 h", "40 d",
    ]  # fmt: skip
    assert [parse_age(a) for a in ("30d", "1.5 h", "2w")] == [30 * DAY, 5400, 14 * DAY]
