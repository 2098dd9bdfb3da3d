"""Rows of one's own functions, and of databases."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arctic_like import load_recipe, registry
from arctic_like.data.base import BadRow, DataSource, make_source
from arctic_like.errors import RecipeError

CODE = """
def rows(count=3, split="train"):
    for i in range(count):
        yield {"text": f"{split} {i}"}

class Rows:
    def __init__(self, start):
        self.start = start
    def __iter__(self):
        return iter([{"text": str(self.start)}, {"text": str(self.start + 1)}])

def wrong():
    return [{"text": "a"}, "b", {"text": "c"}]

def nothing():
    return None

number = 3
"""


def source(kind: str, name: Any, **more: Any) -> DataSource:
    config_type = registry.lookup("source", kind).config_type
    config = config_type.model_validate({"type": kind, "name_or_path": str(name), **more})
    return make_source(config)  # type: ignore[arg-type]


def texts(one: DataSource) -> list[str]:
    return [row["text"] for _, row in one.rows() if not isinstance(row, BadRow)]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "my_rows.py"
    path.write_text(CODE)
    return path


def test_functions_and_classes(code: Path) -> None:
    one = source("python", f"{code}:rows")
    assert next(iter(one.rows())) == ("rows:1", {"text": "train 0"})
    assert not one.problems()
    assert texts(source("python", f"{code}:rows", kwargs={"count": 1})) == ["train 0"]
    assert texts(source("python", f"{code}:rows", split="eval[1:]")) == ["eval 1", "eval 2"]
    assert texts(source("python", f"{code}:rows", split="[-1:]")) == ["train 2"]
    assert texts(source("python", f"{code}:Rows", kwargs={"start": 5})) == ["5", "6"]
    rows = list(source("python", f"{code}:wrong").rows())
    assert [row for _, row in rows if not isinstance(row, BadRow)] == [{"text": "a"}, {"text": "c"}]
    assert str(rows[1][1].error()) == "wrong:2 is 'b', not a map of columns"  # type: ignore[union-attr]
    assert one.content_key() == source("python", f"{code}:rows").content_key()
    assert one.content_key() != source("python", f"{code}:rows", kwargs={"count": 4}).content_key()
    followed = list(one.rows_from())
    assert list(one.rows_from(followed[0][0])) == followed[1:]


def test_an_evaluation_set_is_another_split(code: Path, database: Path) -> None:
    from arctic_like.data.factory import _for_evaluation

    one = source("python", f"{code}:rows")
    evaluating = make_source(_for_evaluation(one.config))
    assert texts(evaluating) == ["eval 0", "eval 1", "eval 2"]
    kept = source("python", f"{code}:rows", split="held[:1]")
    assert texts(make_source(_for_evaluation(kept.config))) == ["held 0"]
    table = source("sql", database, table="texts", split="[:1]")
    assert texts(make_source(_for_evaluation(table.config))) == ["row 1"]


def test_a_file_that_changed_is_imported_again(code: Path) -> None:
    assert len(texts(source("python", f"{code}:rows"))) == 3
    code.write_text(CODE.replace("count=3", "count=4"))
    assert len(texts(source("python", f"{code}:rows"))) == 4
    assert not list(code.parent.glob("__pycache__"))


def test_functions_of_modules_and_of_the_recipe(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(source("python", "my_rows:rows")) == ["train 0", "train 1", "train 2"]
    assert not source("python", "my_rows:rows").problems()
    assert source("python", "no_such_module_for_tests:rows").problems()
    (tmp_path / "parts.py").write_text(CODE.replace("train", "of the recipe"))
    (tmp_path / "recipe.yaml").write_text(
        "code: parts.py\nmodel: {name_or_path: none}\n"
        "data: {sources: [{type: python, name_or_path: rows}, "
        "{type: python, name_or_path: './my_rows.py:Rows', kwargs: {start: 7}}]}\n"
    )
    first, second = load_recipe(tmp_path / "recipe.yaml").config.data.sources  # type: ignore[attr-defined]
    assert texts(make_source(first)) == ["of the recipe 0", "of the recipe 1", "of the recipe 2"]
    assert texts(make_source(second)) == ["7", "8"]


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("{code}:missing", {}, "defines no function missing"),
        ("{code}:number", {}, "defines no function number"),
        ("missing", {}, "the recipe's `code:` defines no function missing"),
        ("{code}:rows", {"kwargs": {"size": 1}}, r"does not fit .*rows\(count=3, .*'size'"),
        ("{code}:nothing", {}, "gives null, not rows"),
        ("{code}:a b", {}, "not the name of a function"),
        ("no_such_module_for_tests:rows", {}, "cannot be imported"),
        ("{code}x.py:rows", {}, "cannot be read: No such file"),
    ],
)
def test_functions_that_cannot_be_used(
    code: Path, name: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        list(source("python", name.format(code=code), **more).rows())


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "my data.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE texts (id INTEGER PRIMARY KEY, text TEXT)")
        connection.execute("CREATE TABLE bare (text TEXT)")
        connection.execute(
            'CREATE TABLE "or der" (text TEXT, b INT, a INT, PRIMARY KEY (a, b)) WITHOUT ROWID'
        )
        connection.execute("CREATE VIEW seen AS SELECT text FROM texts")
        for i in (3, 1, 2):
            connection.execute("INSERT INTO texts VALUES (?, ?)", (i, f"row {i}"))
            connection.execute("INSERT INTO bare VALUES (?)", (f"row {i}",))
            connection.execute('INSERT INTO "or der" VALUES (?, ?, ?)', (f"row {i}", 3 - i, i % 2))
    return path


URLS = ["{}", "sqlite:///{}", "sqlite+pysqlite:///{}"]
"""The file, its URL, and its URL through SQLAlchemy."""


@pytest.mark.parametrize("url", URLS)
def test_queries_and_tables(database: Path, url: str) -> None:
    pytest.importorskip("sqlalchemy")
    name = url.format(database)
    one = source("sql", name, query="SELECT text FROM texts ORDER BY id DESC")
    assert texts(one) == ["row 3", "row 2", "row 1"]
    assert [place for place, _ in one.rows()] == [f"{one.describe()}:{n}" for n in (1, 2, 3)]
    assert not one.problems()
    assert texts(source("sql", name, table="texts")) == ["row 1", "row 2", "row 3"]
    assert texts(source("sql", name, table="or der")) == ["row 2", "row 3", "row 1"]
    assert texts(source("sql", name, table="bare", order_by="text DESC")) == [
        "row 3",
        "row 2",
        "row 1",
    ]
    assert texts(source("sql", name, table="texts", split="train[-2:]")) == ["row 2", "row 3"]
    assert texts(source("sql", name, table="texts", split="[:34%]")) == ["row 1"]
    key = one.content_key()
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE texts SET text = 'other' WHERE id = 2")
    assert one.content_key() != key
    followed = list(one.rows_from())
    assert list(one.rows_from(followed[0][0])) == followed[1:]
    for more, message in (
        ({"query": "SELECT missing FROM texts ORDER BY 1"},
         "query: is refused by the database: no such column"),
        ({"table": "missing"}, "table: is"),
        ({"table": "seen"}, "has no primary key to order its rows by"),
        ({"query": "SELECT text, id AS text FROM texts ORDER BY id"}, "gives the column 'text' twice"),
        ({"query": "DELETE FROM texts WHERE 1 ORDER BY 1"}, "is refused|readonly|near"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            list(source("sql", name, **more).rows())


def test_a_table_without_a_key_has_its_row_numbers(database: Path) -> None:
    assert texts(source("sql", database, table="bare")) == ["row 3", "row 1", "row 2"]
    with pytest.raises(RecipeError, match="has no primary key"):
        list(source("sql", f"sqlite+pysqlite:///{database}", table="bare").rows())


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM t", "SELECT * FROM (SELECT * FROM t ORDER BY id)",
        "SELECT 'order by' FROM t -- ORDER BY id", "SELECT * FROM t /* ORDER BY id */",
        "SELECT row_number() OVER (ORDER BY id) FROM t",
    ],
)  # fmt: skip
def test_a_query_says_its_order(query: str) -> None:
    with pytest.raises(ValidationError, match="has no ORDER BY"):
        source("sql", "x.db", query=query)
    source("sql", "x.db", query=f"{query}\nORDER\n  by id")


def test_databases_that_cannot_be_read(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    for more, message in (
        ({}, "is needed, or table"), ({"query": "x order by 1", "table": "x"}, "both given"),
        ({"query": "x order by 1", "order_by": "y"}, "belongs to table"),
        ({"table": "x", "kwargs": {"query": "y"}}, "is not known here"),
    ):  # fmt: skip
        with pytest.raises(ValidationError, match=message):
            source("sql", database, **more)
    (problem,) = source("sql", "sqlite:///none.db", table="x").problems()
    assert "there is no file none.db" in problem.message
    (problem,) = source("sql", "texts", table="x").problems()
    assert "not the URL of a database" in problem.message
    hidden = source("sql", "postgresql://me:secret@host/base", table="a.b")
    assert hidden.describe() == "postgresql://host/base/a.b"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *m: None if name == "sqlalchemy" else find(name, *m),
    )
    (problem,) = hidden.problems()
    assert "secret" not in str(problem)
    assert "arctic-like[sql]" in problem.hint


def test_a_database_beside_the_recipe(database: Path) -> None:
    """Paths belong to the file that states them, also within a URL."""
    folder = database.parent
    (folder / "recipe.yaml").write_text(
        "model: {name_or_path: none}\n"
        "data: {sources: [{type: sql, name_or_path: './my data.db', table: texts},\n"
        "  {type: sql, name_or_path: 'sqlite:///my data.db', table: texts}]}\n"
    )
    for config in load_recipe(folder / "recipe.yaml").config.data.sources:  # type: ignore[attr-defined]
        assert texts(make_source(config)) == ["row 1", "row 2", "row 3"]
