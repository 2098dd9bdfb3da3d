"""Files of every format and shape, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from arctic_like.data.base import DataSource, SourceConfig, make_source
from arctic_like.data.prepare import chosen_rows
from arctic_like.data.sources import Stretch, read_conversations
from arctic_like.errors import RecipeError

ROWS = [{"text": f"row {i}", "number": i} for i in range(10)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def source(path, **more):
    config = SourceConfig.model_validate({"name_or_path": str(path), **more})
    return make_source(config)


def texts(one):
    return [row["text"] for _, row in one.rows()]


@pytest.fixture
def files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "lines.json").write_text(LINES)
    (tmp_path / "bom.jsonl").write_text("\ufeff" + LINES, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    csv = "text,number\n" + "".join(f'"{r["text"]}",{r["number"]}\n' for r in ROWS)
    (tmp_path / "a.csv").write_text(csv)
    (tmp_path / "a.tsv").write_text(csv.replace(",", "\t"))
    (tmp_path / "a.txt").write_text("".join(r["text"] + "\n" for r in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=3)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.json",
        "wrapped.json",
        "lines.json",
        "bom.jsonl",
        "a.jsonl.gz",
        "a.csv",
        "a.tsv",
        "a.parquet",
        "a.arrow",
    ],
)
def test_formats(files, name):
    rows = list(source(files / name).rows())
    assert [row["text"] for _, row in rows] == [row["text"] for row in ROWS]
    first = 2 if name in ("a.csv", "a.tsv") else 1  # the header is a line
    assert [place for place, _ in rows] == [f"{name}:{i}" for i in range(first, first + 10)]


def test_text_files(files):
    assert texts(source(files / "a.txt")) == [(files / "a.txt").read_text()]
    assert texts(source(files / "a.txt", kwargs={"sample_by": "line"})) == [r["text"] for r in ROWS]
    (files / "p.txt").write_text("one\ntwo\n\n\nthree\n")
    assert list(source(files / "p.txt", kwargs={"sample_by": "paragraph"}).rows()) == [
        ("p.txt:1", {"text": "one\ntwo"}),
        ("p.txt:5", {"text": "three"}),
    ]
    with pytest.raises(RecipeError, match="unexpected keyword"):
        texts(source(files / "a.jsonl", kwargs={"sample_by": "line"}))


def test_globs_and_folders(tmp_path):
    for name in ("train-1", "train-2", "eval", "other"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert texts(source(tmp_path / "train-*.jsonl")) == ["train-1", "train-2"]
    assert texts(source(tmp_path)) == ["train-1", "train-2"]
    assert texts(source(tmp_path, split="eval")) == ["eval"]
    assert texts(source(f"{tmp_path}:other")) == ["other"]
    assert texts(source(tmp_path, split="eval", split_mapping={"eval": "other"})) == ["other"]
    with pytest.raises(RecipeError, match="no split 'nothing'"):
        texts(source(tmp_path, split="nothing"))


def test_saved_folders(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([3])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert texts(source(tmp_path / "one")) == [r["text"] for r in ROWS]
    assert texts(source(f"{tmp_path / 'two'}:train[:2]")) == ["row 0", "row 1"]
    assert texts(source(tmp_path / "two", split="eval")) == ["row 3"]
    keys = {source(tmp_path / "one", split=s).content_key() for s in ("", "[:3]", "[1:3]")}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("[:3]", [0, 1, 2]), ("train[7:]", [7, 8, 9]), ("[-2:]", [8, 9]), ("[:50%]", [0, 1, 2, 3, 4]),
        ("[20%:30%]", [2]), ("train", list(range(10))), ("[8:100]", [8, 9]),
    ],
)  # fmt: skip
def test_slices(files, part, rows):
    assert texts(source(f"{files / 'a.jsonl'}:{part}")) == [f"row {i}" for i in rows]
    assert texts(source(files / "a.jsonl", split=part)) == [f"row {i}" for i in rows]


def test_stretch_refuses_nonsense():
    with pytest.raises(RecipeError, match="not a split"):
        Stretch.parse("train[1:2:3]")


def test_sampling(files):
    def drawn(**more):
        return [row["number"] for _, row in chosen_rows(source(files / "a.jsonl", **more))]

    five = drawn(sample_count=5)
    assert len(set(five)) == 5
    assert five == sorted(five)
    assert drawn(sample_count=5) == five
    assert drawn(sample_ratio=0.5) == five
    assert drawn(sample_count=5, sample_seed=1) != five
    assert drawn(sample_count=10) == list(range(10))
    with pytest.raises(RecipeError, match=r"is 11, but .*a\.jsonl has 10 rows"):
        drawn(sample_count=11)


def test_a_split_is_named_once(files):
    with pytest.raises(RecipeError, match=r"split: is 'test', but name_or_path says 'train'"):
        texts(source(f"{files / 'a.jsonl'}:train", split="test"))


def test_paths_that_are_not_there_are_seen_at_once(files):
    for name in ("/none/x", "x.jsonl", "./x", "x-*.parquet", ""):
        (problem,) = source(name).problems()
        assert problem.place == "name_or_path"
    assert not source("owner/name").problems()
    assert not source(f"{files / 'a.jsonl'}:train[:3]").problems()
    assert source("owner/name", type="file").problems()


def test_a_source_takes_a_source_config():
    from arctic_like.config.base import PartConfig

    with pytest.raises(TypeError, match="must be a SourceConfig"):

        class Wrong(DataSource):
            name = "wrong-for-tests"
            config_type = PartConfig


def test_content_key_is_of_the_content(files):
    before = source(files / "a.jsonl").content_key()
    assert source(files / "a.jsonl").content_key() == before
    (files / "a.jsonl").write_text(LINES.replace("row 3", "row x"))
    assert source(files / "a.jsonl").content_key() != before


def test_a_source_of_ones_own():
    class Squares(DataSource):
        name = "squares-for-tests"
        count = 3

        def rows(self):
            for i in range(self.count):
                yield f"squares:{i}", {"text": str(i * i)}

    one = make_source(SourceConfig(type="squares-for-tests"))
    key = one.content_key()
    assert [row["text"] for _, row in one.rows()] == ["0", "1", "4"]
    Squares.count = 4
    assert one.content_key() != key


def test_read_conversations(files):
    assert next(read_conversations(files / "a.jsonl")) == ("a.jsonl:1", ROWS[0])


BROKEN = {
    "truncated.jsonl": (b'{"text": "a"}\n{"text": "b\n', r"truncated\.jsonl:2: is not valid JSON"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl:1: is not a JSON object"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin\.jsonl:2: is not UTF-8 \(byte 0xe9"),
    "broken.json": (b'[{"text": 1},\n {]', r"broken\.json:2: is not valid JSON"),
    "word.json": (b'"word"', r"word\.json: is neither a list of objects"),
    "short.csv": (b"a,b\n1,2\n3\n", r"short\.csv:3: has not the 2 fields"),
    "long.csv": (b"a,b\n1,2\n3,4,5\n", r"long\.csv:3: has not the 2 fields"),
    "quote.csv": (b'a,b\n1,"2\n', r"quote\.csv:\d: is not valid CSV"),
    "no.parquet": (b"PAR1 no", r"no\.parquet: cannot be read as parquet"),
    "no.arrow": (b"nothing of arrow", r"no\.arrow: cannot be read as Arrow"),
    "half.jsonl.gz": (gzip.compress(LINES.encode())[:-12], r"half\.jsonl\.gz: is not a whole gzip"),
    "what.xyz": (b"?", r"what\.xyz: cannot be read: \.xyz is no known format"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        list(source(tmp_path / name).rows())


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(RecipeError, match="is not a file here"):
        list(source(tmp_path / "none.jsonl").rows())
    with pytest.raises(RecipeError, match="is not a file here"):
        list(source(tmp_path / "none.jsonl", type="file").rows())
    with pytest.raises(RecipeError, match=r"neither a file here nor .*\(offline\)"):
        list(source("no-such-owner-for-tests/none").rows())


def test_the_bundled_readers_need_no_more_than_a_path():
    from arctic_like.data.readers import READERS, reader_of

    for suffix in READERS:
        assert reader_of(Path(f"x{suffix}")) is READERS[suffix]
        assert reader_of(Path(f"x{suffix}.gz")) is READERS[suffix]
    assert reader_of(Path("x.gz")) is None
