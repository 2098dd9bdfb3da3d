"""Files of every format and shape, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json

import pytest
from pydantic import ValidationError

from arctic_like.data.base import BadRow, DataSource, SourceConfig, make_source, usable
from arctic_like.data.sources import Stretch, read_conversations
from arctic_like.data.tokenise import chosen_rows
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
    with pytest.raises(RecipeError, match=r"has 'sample_by', which the reader of \.jsonl does not"):
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
    for name in ("/none/x", "x.jsonl", "./x", "x-*.parquet", "~nobody-for-tests/x", ""):
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
    "short.csv": (b"a,b\n1,2\n3\n", r"short\.csv:3: has 1 fields, not the 2"),
    "long.csv": (b"a,b\n1,2\n3,4,5\n", r"long\.csv:3: has 3 fields, not the 2"),
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
        list(usable(source(tmp_path / name).rows()))


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


def compressed(kind, data):
    import bz2
    import lzma

    import pyarrow as pa

    if kind == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[kind].compress(data)


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"])
def test_compressed(files, name, kind):
    plain = list(source(files / name).rows())
    (files / (name + kind)).write_bytes(compressed(kind, (files / name).read_bytes()))
    found = list(source(files / (name + kind)).rows())
    assert [row for _, row in found] == [row for _, row in plain]
    assert not source(files / (name + kind)).problems()


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zst"])
def test_what_is_not_whole_is_said_of_the_file(tmp_path, kind):
    whole = compressed(kind, LINES.encode() * 500)
    for name, data in (("half", whole[: len(whole) // 2]), ("other", b"no such format" * 9)):
        path = tmp_path / f"{name}.jsonl{kind}"
        path.write_bytes(data)
        with pytest.raises(RecipeError, match=rf"{name}\.jsonl{kind}: is not a whole \w+ file"):
            list(source(path).rows())


MIXED = {
    "rows.jsonl": (
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b\n\n{"text": "\xe9"}\n[1]\n{"text": "c"}\r\n'
        + b"[" * 100_000 + b'\n{"text": "d\xe2\x80\xa8"}',
        ["a", (2, "is not valid JSON (Invalid control"), (4, "is not UTF-8 (byte 0xe9)"),
         (5, "is not a JSON object"), "c", (7, "is not valid JSON"), "d\u2028"],
    ),
    "first.json": (b'{"text": a}\n{"text": "b"}\n', [(1, "is not valid JSON"), "b"]),
    "list.json": (b'[{"text": "a"}, 3, {"text": "b"}]', ["a", (2, "is not a JSON object"), "b"]),
    "one.json": (b'{"messages": [{"role": "user", "content": "x"}]}', [None]),
    "rows.csv": (
        b'text,id\na,1\nb\n\n"c\nd",2\n\xe9,3\ne,4,5\nf,6\n',
        ["a", (3, "has 1 fields, not the 2"), "c\nd", (7, "is not UTF-8"),
         (8, "has 3 fields, not the 2"), "f"],
    ),
    "lines.txt": (b"a\n\xff\n\nb", ["a", (2, "is not UTF-8 (byte 0xff)"), "b"]),
    "parts.md": (b"a\nb\n\nc\n\xff\n\nd\n", ["a\nb", (5, "is not UTF-8"), "d"]),
    "whole.txt": (b"a\n\xff\n", [(2, "is not UTF-8")]),
}  # fmt: skip
BY = {"lines.txt": "line", "parts.md": "paragraph"}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_wrong_with_a_row_leaves_the_others(tmp_path, name):
    content, expected = MIXED[name]
    (tmp_path / name).write_bytes(content)
    more = {"kwargs": {"sample_by": BY[name]}} if name in BY else {}
    found = list(source(tmp_path / name, **more).rows())
    assert len(found) == len(expected)
    for (place, row), wanted in zip(found, expected, strict=True):
        if isinstance(wanted, tuple):
            assert isinstance(row, BadRow)
            assert (row.file, row.line) == (str(tmp_path / name), wanted[0])
            assert row.message.startswith(wanted[1])
            assert f"{name}:{wanted[0]}: {wanted[1]}" in str(row.error())
            assert len(row.message) < 300
        else:
            assert place.startswith(f"{name}:")
            assert row.get("text") == wanted


def test_files_that_cannot_be_read_at_all(tmp_path):
    (tmp_path / "wide.jsonl").write_text(LINES, encoding="utf-16")
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    for name, message in (
        ("wide.jsonl", "is text in UTF-16"),
        ("twice.csv", "names the column 'a' twice"),
    ):
        with pytest.raises(RecipeError, match=message):
            list(source(tmp_path / name).rows())
    for name in ("empty.jsonl", "empty.csv", "empty.txt"):
        (tmp_path / name).write_text("")
        assert list(source(tmp_path / name).rows()) == []


def test_a_row_of_ten_megabytes(tmp_path):
    long = "word " * 2_000_000
    lines = [json.dumps({"text": "a"}), json.dumps({"text": long}), json.dumps({"text": long})[:-9]]
    (tmp_path / "long.jsonl").write_text("\n".join([*lines, lines[0]]))
    first, second, broken, last = (row for _, row in source(tmp_path / "long.jsonl").rows())
    assert (first, second["text"], last) == ({"text": "a"}, long, {"text": "a"})
    assert broken.line == 3
    assert len(broken.message) < 300


def followed(one, cursor=None):
    return list(one.rows_from(cursor))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("a.jsonl", {}), ("bom.jsonl", {}), ("lines.json", {}), ("a.json", {}), ("a.jsonl.gz", {}),
        ("a.csv", {}), ("a.parquet", {}), ("a.arrow", {}), ("*.jsonl", {}), ("a.jsonl:train[3:8]", {}),
        ("*.jsonl", {"split": "[-15:90%]"}), ("a.txt", {"kwargs": {"sample_by": "line"}}),
        ("p.txt", {"kwargs": {"sample_by": "paragraph"}}), ("saved", {}), ("saved:train[2:5]", {}),
        ("mixed.jsonl", {}),
    ],
)  # fmt: skip
def test_a_cursor_goes_on_after_its_row(files, name, more):
    import datasets

    (files / "p.txt").write_text("one\ntwo\n\n\nthree\nfour\n\nfive\n")
    (files / "mixed.jsonl").write_bytes(MIXED["rows.jsonl"][0])
    datasets.Dataset.from_list(ROWS).save_to_disk(str(files / "saved"))
    one = source(files / name, **more)
    rows = followed(one)
    assert [(place, row) for _, place, row in rows] == list(one.rows())
    assert len(rows) > 2
    for number, (cursor, _, _) in enumerate(rows, 1):
        again = json.loads(json.dumps(cursor))
        assert followed(source(files / name, **more), again) == rows[number:]


def test_a_cursor_reads_nothing_twice(files, monkeypatch):
    """The bytes before a cursor of JSON lines, and the row groups before one of parquet."""
    import pyarrow.parquet as pq

    (files / "long.jsonl").write_text(LINES * 1000)
    one = source(files / "long.jsonl")
    cursor = [cursor for cursor, _, _ in one.rows_from()][-3]
    parsed = []
    loads = json.loads
    monkeypatch.setattr("json.loads", lambda text, **more: parsed.append(1) or loads(text, **more))
    assert len(followed(one, cursor)) == 2
    assert len(parsed) == 2
    groups = []
    batches = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches",
        lambda self, **more: groups.append(more["row_groups"]) or batches(self, **more),
    )  # fmt: skip
    one = source(files / "a.parquet")
    assert len(followed(one, {"file": 0, "mark": 7, "rows": 7})) == 3
    assert groups == [[2, 3]]


def test_a_source_of_ones_own_has_cursors_too():
    class Cubes(DataSource):
        name = "cubes-for-tests"

        def rows(self):
            return ((f"cubes:{i}", {"text": str(i**3)}) for i in range(5))

    one = make_source(SourceConfig(type="cubes-for-tests"))
    cursor = followed(one)[1][0]
    assert [row["text"] for _, _, row in one.rows_from(cursor)] == ["8", "27", "64"]


@pytest.fixture
def remote(files):
    """The files of `files` behind `memory://`."""
    import fsspec

    system = fsspec.filesystem("memory")
    for path in files.iterdir():
        system.pipe(f"/data/{path.name}", path.read_bytes())
    system.pipe("/folder/train-1.jsonl", LINES.encode())
    system.pipe("/folder/test.jsonl", LINES.encode()[:30])
    yield system
    system.rm("/data", recursive=True)
    system.rm("/folder", recursive=True)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow", "a.jsonl:train[2:4]"],
)
def test_urls(files, remote, name):
    one, local = source(f"memory://data/{name}"), source(files / name)
    assert list(one.rows()) == list(local.rows())
    assert not one.problems()
    rows = followed(one)
    assert followed(one, rows[0][0]) == rows[1:]


def test_urls_of_many_files(remote):
    assert len(texts(source("memory://data/a.json*"))) == 30
    assert len(texts(source("memory://folder"))) == 10
    assert len(texts(source("memory://folder", split="eval"))) == 1
    with pytest.raises(RecipeError, match="memory://folder has no split 'other'"):
        texts(source("memory://folder:other"))
    with pytest.raises(RecipeError, match=r"none\.jsonl: cannot be read"):
        texts(source("memory://data/none.jsonl"))


def test_content_of_a_url(remote):
    one = source("memory://data/a.jsonl")
    before = one.content_key()
    assert source("memory://data/a.jsonl").content_key() == before
    remote.pipe("/data/a.jsonl", LINES.replace("row 3", "row x").encode())
    assert one.content_key() != before


def test_urls_that_cannot_be_opened_here(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name in ("s3fs", "aiohttp", "adlfs") else find(name, *more),
    )
    for url, message, hint in (
        ("s3://bucket/a.jsonl", "needs the package s3fs", "arctic-like[s3]"),
        ("https://host/a.jsonl", "needs the package aiohttp", "arctic-like[http]"),
        ("abfs://box/a.jsonl", "needs the package adlfs", "pip install adlfs"),
        ("nothing://a/b.jsonl", "nothing is no known protocol", "s3, gs"),
    ):
        (problem,) = source(url).problems()
        assert problem.place == "name_or_path"
        assert message in problem.message
        assert hint in problem.hint
        with pytest.raises(RecipeError, match=message):
            texts(source(url))


def test_streams_of_the_hub(tmp_path, monkeypatch):
    """`datasets`' own reader of JSON stands in for a name on the Hub: no network."""
    rows = [{"text": f"row {i}", "number": i} for i in range(1000)]
    for part in range(2):
        lines = [json.dumps(row) + "\n" for row in rows[part * 500 : part * 500 + 500]]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    parts = [str(tmp_path / f"{part}.jsonl") for part in range(2)]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    one = source("json", kwargs={"data_files": {"train": parts}})
    found = followed(one)
    assert [row for _, _, row in found] == rows
    assert found[-1][1] == "json:1000"
    for number in (1, 255, 256, 257, 499, 500, 501, 770, 999, 1000):
        cursor = json.loads(json.dumps(found[number - 1][0]))
        again = followed(source("json", kwargs={"data_files": {"train": parts}}), cursor)
        assert [(place, row) for _, place, row in again] == [f[1:] for f in found[number:]]
    middle = source("json", split="train[3:6]", kwargs={"data_files": {"train": parts}})
    rows_3 = followed(middle)
    assert [row["number"] for _, _, row in rows_3] == [3, 4, 5]
    assert [row["number"] for _, _, row in middle.rows_from(rows_3[0][0])] == [4, 5]
    with pytest.raises(RecipeError, match="needs the number of rows"):
        followed(source("json", split="train[:10%]", kwargs={"data_files": parts}))
    with pytest.raises(RecipeError, match=r"set data\.streaming: true"):
        list(source("json", kwargs={"streaming": True}).rows())


def test_arguments_of_the_hub(monkeypatch):
    asked = []

    def load(path, **more):
        asked.append((path, more))
        import datasets

        return datasets.DatasetDict({"main": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr("datasets.load_dataset", load)
    one = source("owner/name:main[:2]", revision="v2", kwargs={"name": "easy"})
    assert texts(one) == ["row 0", "row 1"]
    assert asked == [("owner/name", {"name": "easy", "revision": "v2"})]
    # a table in memory has no file: its rows tell it from another
    key = one.content_key()
    monkeypatch.setitem(ROWS[0], "text", "changed")
    assert one.content_key() != key


def test_texts_of_several_columns(tmp_path):
    rows = [
        {"title": "T", "turns": [{"from": "gpt", "value": "a"}], "n": 1},
        {"title": "U", "turns": [], "n": 2},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = source_of(
        "huggingface_causal", tmp_path / "a.jsonl", template="{head}{{}}: {said}",
        column_mapping={"head": "title", "said": "turns.from.gpt"},
    )  # fmt: skip
    (_, first), (_, second) = one.rows()
    assert first == {"text": "T{}: a"}
    assert isinstance(second, BadRow)
    assert "has no turn with from 'gpt'" in second.message
    assert [row for _, _, row in one.rows_from()] == [first, second]
    other = source_of("huggingface_causal", tmp_path / "a.jsonl", column_mapping={"text": "title"})
    assert texts(other) == ["T", "U"]
    assert one.content_key() != other.content_key()
    for wrong_ in (
        {"template": "{a}"}, {"template": "{b}", "column_mapping": {"a": "x"}},
        {"column": "a", "column_mapping": {"text": "a"}}, {"template": "{", "column_mapping": {"a": "x"}},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            source_of("huggingface_causal", "x", **wrong_)


def source_of(kind, name, **more):
    from arctic_like import registry

    config_type = registry.lookup("source", kind).config_type
    config = config_type.model_validate({"type": kind, "name_or_path": str(name), **more})
    return make_source(config)


def test_snowflake_is_declared_and_refused():
    for kind in ("snowflake", "snowflake_table", "snowflake_dataset"):
        one = source_of(kind, "", sql="SELECT 1", column_mapping={"A": "a"}, limit="1K")
        (problem,) = one.problems()
        assert "type: sql" in problem.hint
        with pytest.raises(RecipeError, match="is not built"):
            one.rows()
