"""Documents of a source: the same bytes however they were made, and rows that cannot be used."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest
import xxhash

from arctic_like.data import cache, hashes, showing, tokenise
from arctic_like.data.base import BadRow, SourceConfig, make_source
from arctic_like.data.documents import Documents, DocumentWriter
from arctic_like.data.encode import Encoded, batched, encoded, joined
from arctic_like.data.tokenise import Store, documents
from arctic_like.errors import RecipeError, RunError

FORK = multiprocessing.get_context("fork")
ROWS = 3000


def encode(rows):
    """A row's text as its bytes; `bad` is no text. One value a document says how long it is."""
    bad = [BadRow(place, "is bad", "mend it") for place, row in rows if row["text"] == "bad"]
    good = [(place, row["text"].encode()) for place, row in rows if row["text"] != "bad"]
    tokens = [np.frombuffer(text, dtype=np.uint8).astype(np.int32) for _, text in good]
    found = joined(
        [place for place, _ in good], tokens, [np.ones(len(t), np.uint8) for t in tokens],
        Counter(even=sum(len(t) % 2 == 0 for t in tokens)),
    )  # fmt: skip
    found.columns["length"] = np.array([len(t) for t in tokens], dtype=np.int64)
    found.bad += bad
    return found


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    words = rng.integers(0, 10**6, (ROWS, 40))
    lines = [json.dumps({"text": " ".join(map(str, row[: 1 + row[0] % 40]))}) for row in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def prepared(file, root, *, encoder=encode, **more):
    config = {k: more.pop(k) for k in list(more) if k in SourceConfig.model_fields}
    source = make_source(SourceConfig(name_or_path=str(file), **config))
    return documents(source, shape={}, encoder=lambda: encoder, store=Store(root, **more))


def content(entry):
    """Every file of an entry."""
    return {path.name: path.read_bytes() for path in sorted(entry.iterdir())}


def test_any_number_of_processes_gives_the_same_bytes(file, tmp_path, monkeypatch):
    monkeypatch.setattr("arctic_like.data.encode._BATCH_ROWS", 100)
    one, three = (prepared(file, tmp_path / str(n), num_proc=n) for n in (1, 3))
    assert one.name == three.name
    assert content(one) == content(three)
    made = Documents(one)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert len(made) == ROWS
    for n in (0, 1, 17, ROWS - 1):
        tokens = made.tokens[made.offsets[n] : made.offsets[n + 1]]
        assert bytes(tokens.astype(np.uint8)).decode() == texts[n]
        assert made.place(n) == f"rows.jsonl:{n + 1}"
        assert made.columns["length"][n] == len(texts[n])
        assert made.digests[n] == xxhash.xxh3_64_intdigest(tokens.tobytes())
    facts = cache.facts(one)
    assert facts["rows"] == facts["documents"] == ROWS
    assert facts["even"] == sum(len(text) % 2 == 0 for text in texts)


def slow(log, pause):
    """An encoder that notes what it gets."""

    def encoder(rows):
        with log.open("a") as file:
            file.write("".join(f"{place}\n" for place, _ in rows))
        time.sleep(pause)
        return encode(rows)

    return encoder


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("more", [{}, {"sample_count": 2000}])
def test_killed_it_goes_on(file, tmp_path, monkeypatch, num_proc, more):
    monkeypatch.setattr("arctic_like.data.encode._BATCH_ROWS", 100)
    monkeypatch.setattr(tokenise, "_SAVE_ROWS", 300)
    whole = content(prepared(file, tmp_path / "whole", num_proc=1, **more))
    root, log = tmp_path / "cache", tmp_path / "log"
    victim = FORK.Process(
        target=prepared, args=(file, root),
        kwargs={"encoder": slow(log, 0.05), "num_proc": num_proc, **more},
    )  # fmt: skip
    victim.start()
    while not (noted := list(root.glob("documents/*.tmp-*/progress.json"))):
        assert victim.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    (noted[0].parent / "progress.json.7").write_text("{")  # half a note
    done = cache.progress(noted[0].parent)["rows"]
    assert 0 < done < (2000 if more else ROWS)
    before = log.read_text().splitlines()
    entry = prepared(file, root, encoder=slow(log, 0), num_proc=num_proc, **more)
    assert content(entry) == whole
    assert [path.name for path in entry.parent.iterdir() if ".tmp-" in path.name] == []
    again = log.read_text().splitlines()[len(before) :]
    # nothing that was noted is tokenised again, and nothing behind it is left out
    assert len(again) == (2000 if more else ROWS) - done
    assert set(before) | set(again) == set(log.read_text().splitlines())


def test_interrupted_it_goes_on_and_at_a_failure_too(file, tmp_path, monkeypatch):
    monkeypatch.setattr("arctic_like.data.encode._BATCH_ROWS", 100)
    monkeypatch.setattr(tokenise, "_SAVE_ROWS", 300)
    whole = content(prepared(file, tmp_path / "whole"))
    calls = [0]

    def stops(error):
        def encoder(rows):
            calls[0] += 1
            if calls[0] == 10:
                raise error
            return encode(rows)

        return encoder

    for error in (KeyboardInterrupt(), RunError("full"), OSError("full")):
        calls[0] = 0
        with pytest.raises(type(error)):
            prepared(file, tmp_path / "cache", encoder=stops(error), num_proc=1)
    calls[0] = 10  # each attempt came nine batches further
    assert content(prepared(file, tmp_path / "cache", encoder=stops(None), num_proc=1)) == whole
    assert calls[0] - 10 < 30 - 3 * 6


def leave(file, root, monkeypatch, *, host, rows=600):
    """What a process of a host leaves that is gone after some rows."""
    monkeypatch.setattr("arctic_like.data.encode._BATCH_ROWS", 100)
    monkeypatch.setattr(tokenise, "_SAVE_ROWS", 300)
    seen = [0]

    def encoder(batch):
        seen[0] += len(batch)
        if seen[0] > rows:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        prepared(file, root, encoder=encoder, num_proc=1)
    (left,) = (root / "documents").glob("*.tmp-*")
    return left.rename(left.with_name(left.name.rpartition(".tmp-")[0] + f".tmp-{host}-1"))


def test_what_another_node_left_is_copied(file, tmp_path, monkeypatch):
    whole = content(prepared(file, tmp_path / "whole"))
    root = tmp_path / "cache"
    left = leave(file, root, monkeypatch, host="elsewhere")
    there = content(left)
    # it may be alive, and writing
    with (left / "tokens.bin").open("ab") as tokens:
        tokens.write(b"abcd" * 1000)
    log = tmp_path / "log"
    assert content(prepared(file, root, encoder=slow(log, 0), num_proc=1)) == whole
    assert len(log.read_text().splitlines()) == ROWS - 600
    assert content(left).keys() == there.keys()
    for path in left.iterdir():
        os.utime(path, (1, 1))
    os.utime(left, (1, 1))
    again = prepared(file, root, encoder=encode)
    assert left.exists()  # a complete entry is not looked at
    (again / cache.MARKER).unlink()
    prepared(file, root, encoder=encode)
    assert not left.exists()


def test_what_this_node_left_is_taken(file, tmp_path, monkeypatch):
    whole = content(prepared(file, tmp_path / "whole"))
    root = tmp_path / "cache"
    # process 1 lives, but the lock is ours
    left = leave(file, root, monkeypatch, host=socket.gethostname())
    log = tmp_path / "log"
    assert content(prepared(file, root, encoder=slow(log, 0), num_proc=1)) == whole
    assert len(log.read_text().splitlines()) == ROWS - 600
    assert not left.exists()


def test_a_damaged_attempt_is_told(file, tmp_path, monkeypatch):
    left = leave(file, tmp_path / "cache", monkeypatch, host="elsewhere")
    os.truncate(left / "tokens.bin", 40)
    with pytest.raises(RunError, match=r"tokens\.bin is shorter than was noted"):
        prepared(file, tmp_path / "cache")


def mixed(tmp_path):
    texts = ["fine", "bad", "fine too", None, "{", "bad", "last"]
    lines = [text if text == "{" else json.dumps({"text": text} if text else []) for text in texts]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    return tmp_path / "mixed.jsonl"


@pytest.mark.parametrize("num_proc", [1, 2])
def test_bad_rows(tmp_path, monkeypatch, num_proc):
    monkeypatch.setattr("arctic_like.data.encode._BATCH_ROWS", 3)
    file, root = mixed(tmp_path), tmp_path / "cache"
    for _ in range(2):  # nothing of the failure is in the way
        with pytest.raises(RecipeError) as caught:
            prepared(file, root, num_proc=num_proc)
        assert str(caught.value) == (
            "mixed.jsonl:2 is bad; mend it\n    data.on_bad_sample: skip leaves such rows out"
        )
    entry = prepared(file, root, num_proc=num_proc, on_bad_sample="skip")
    facts = cache.facts(entry)
    assert (facts["rows"], facts["documents"], facts["bad"]) == (7, 3, 4)
    assert [bad["place"].split(":")[1] for bad in facts["bad_examples"]] == ["2", "4", "5"]
    assert [Documents(entry).place(n) for n in range(3)] == [f"mixed.jsonl:{n}" for n in (1, 3, 7)]
    # made under `skip`, and no good under `error`
    with pytest.raises(RecipeError, match="is bad; mend it"):
        prepared(file, root, num_proc=num_proc)
    # a source's own word goes before
    assert prepared(file, root, **{"on_bad_sample": "skip"}) == entry


def test_what_was_done_before_a_bad_row_is_kept_for_skip(file, tmp_path, monkeypatch):
    monkeypatch.setattr("arctic_like.data.encode._BATCH_ROWS", 100)
    monkeypatch.setattr(tokenise, "_SAVE_ROWS", 300)
    with file.open("a") as rows:
        rows.write('\n{"text": "bad"}')
    log = tmp_path / "log"
    with pytest.raises(RecipeError, match="is bad"):
        prepared(file, tmp_path / "cache", encoder=slow(log, 0), num_proc=1)
    before = len(log.read_text().splitlines())
    entry = prepared(
        file, tmp_path / "cache", encoder=slow(log, 0), num_proc=1, on_bad_sample="skip"
    )
    assert cache.facts(entry)["bad"] == 1
    assert len(log.read_text().splitlines()) - before <= 301


def test_a_file_that_changes_meanwhile_is_refused(file, tmp_path):
    def encoder(rows):
        with file.open("a") as more:
            more.write('\n{"text": "new"}')
        return encode(rows)

    with (
        hashes.remembered(tmp_path / "cache", verify=False),
        pytest.raises(RunError, match=r"rows\.jsonl was changed while it was prepared"),
    ):
        prepared(file, tmp_path / "cache", encoder=encoder, num_proc=1)
    assert not cache.progress(tmp_path)


def test_batches_are_bounded():
    rows = [(str(n), {"text": "x" * 1000, "more": [1] * 10}) for n in range(3000)]
    sizes = [len(batch) for batch in batched(rows)]
    assert sum(sizes) == 3000
    assert max(sizes) == 512
    long = [("0", {"text": "x" * (1 << 21)}), ("1", {"text": "y" * (1 << 21)})]
    assert [len(batch) for batch in batched(long)] == [1, 1]
    assert list(batched([])) == []


def test_one_batch_needs_no_process():
    def encoder(rows):
        found = encode(rows)
        found.counts["pid"] = os.getpid()
        return found

    (only,) = encoded([("a", {"text": "x"})], encoder, num_proc=2)
    assert only.counts["pid"] == os.getpid()
    assert only.rows == 1


def test_columns_must_be_the_same(tmp_path):
    writer = DocumentWriter(tmp_path)
    writer.add(["a"], [1], [5], [1], {"label": [1]})
    with pytest.raises(ValueError, match="columns"):
        writer.add(["b"], [1], [5], [1])
    with pytest.raises(ValueError, match="do not match"):
        writer.add(["b"], [1], [5], [1], {"label": [1, 2]})


def test_no_row_is_no_document(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    entry = prepared(tmp_path / "rows.jsonl", tmp_path / "cache")
    assert len(Documents(entry)) == 0
    assert isinstance(encode([]), Encoded)


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, ROWS), ({"split": "train[:10%]"}, ROWS // 10), ({"sample_ratio": 0.5}, ROWS // 2),
     ({"sample_count": 7}, 7)],
)  # fmt: skip
def test_how_many_rows_are_expected(file, tmp_path, more, expected):
    source = make_source(SourceConfig(name_or_path=str(file), **more))
    with hashes.remembered(tmp_path, verify=False):
        source.content_key()
        assert tokenise._expected(source) == expected
    assert sum(1 for _ in tokenise.chosen_rows(source)) == expected


def test_progress_in_lines(monkeypatch):
    from loguru import logger

    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), format="{message}")
    try:
        monkeypatch.setattr(showing, "_EVERY_SECONDS", 0)
        with showing.progress_of("tokenising x", 200) as shown:
            shown.update(50, 1000)
        with showing.progress_of("tokenising y") as shown:
            shown.update(50, 1000)
    finally:
        logger.remove(sink)
    assert said[0].startswith("tokenising x: 50 rows (25%), 1,000 tokens, ")
    assert said[1].startswith("tokenising y: 50 rows, 1,000 tokens, ")


def test_progress_on_a_terminal(monkeypatch):
    from rich.console import Console

    screen = Console(force_terminal=True, width=80, file=io.StringIO(), legacy_windows=False)
    monkeypatch.setattr(showing, "terminal", lambda: screen)
    with showing.progress_of("tokenising a[b].jsonl", 200) as shown:
        shown.update(50, 1000)
    written = screen.file.getvalue()
    assert "tokenising a[b].jsonl" in written
    assert "50 rows, 1,000 tokens" in written
