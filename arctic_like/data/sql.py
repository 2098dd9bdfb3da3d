"""`type: sql`: the rows of a query or a table. SQLite needs nothing; other databases SQLAlchemy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from arctic_like.config.base import wrong
from arctic_like.data.base import DataSource, ReadRow, SourceConfig
from arctic_like.data.splits import Stretch
from arctic_like.errors import Problem, RecipeError

_SQLITE = "sqlite:///"
_SQLITE_FILES = (".db", ".sqlite", ".sqlite3")
_FETCH = 1024


class SQLSourceConfig(SourceConfig):
    """A query of a database. `name_or_path` is the database's URL, or a file of SQLite."""

    splits_in_name: ClassVar[bool] = False

    type: str = "sql"

    query: str = ""
    """What to read, in an order that never changes: it ends in `ORDER BY` and a column that is
    different in every row."""

    table: str = ""
    """A table to read as a whole, in place of a query."""

    order_by: str = ""
    """Columns that order the table's rows; its primary key unless given."""

    @model_validator(mode="after")
    def _one_way_to_read(self) -> SQLSourceConfig:
        if bool(self.query) == bool(self.table):
            both = "and table are both given" if self.query else "is needed, or table"
            raise wrong(both, place="query", hint="say one of them")
        if self.query and self.order_by:
            raise wrong("belongs to table", place="order_by", hint="put ORDER BY into the query")
        if self.query and not _is_ordered(self.query):
            raise wrong(
                "has no ORDER BY, and a database gives rows in any order",
                place="query",
                hint="end it with ORDER BY and a column that is different in every row, as id",
            )
        if self.kwargs:
            raise wrong("is not known here", place="kwargs", hint="use query, table or order_by")
        return self


def _is_ordered(query: str) -> bool:
    """Whether the outermost SELECT is ordered: an ORDER BY outside of brackets, texts and
    comments."""
    plain = re.sub(r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"", " ", query, flags=re.S)
    while (inner := re.sub(r"\([^()]*\)", " ", plain)) != plain:
        plain = inner
    return re.search(r"\border\s+by\b", plain, re.I) is not None


class SQLSource(DataSource):
    """`type: sql`: the rows of a query, or of a table in the order of its primary key."""

    name = "sql"
    config_type = SQLSourceConfig
    config: SQLSourceConfig

    def problems(self) -> list[Problem]:
        """A file that is not there, a driver that is missing."""
        import importlib.util

        url = self.config.name_or_path
        file = _sqlite_file(url)
        if file is not None and not file.is_file():
            message = f"is {url!r}, and there is no file {file}"
            return [Problem(message, place="name_or_path", hint="check the path")]
        if file is None and "://" not in url:
            return [Problem(f"is {url!r}, not the URL of a database", place="name_or_path",
                            hint="write sqlite:///file.db, or postgresql://user@host/name")]  # fmt: skip
        if file is None and importlib.util.find_spec("sqlalchemy") is None:
            return [_needs_sqlalchemy(url)]
        return []

    def rows(self) -> Iterator[ReadRow]:
        part = Stretch.parse(self.config.split)
        file = _sqlite_file(self.config.name_or_path)
        found = _sqlite_rows(file, self.config) if file else _alchemy_rows(self.config)
        wanted = part.rows(1 << 62)
        if part.needs_total:
            total = sum(1 for _ in found)
            wanted = part.rows(total)
            found = _sqlite_rows(file, self.config) if file else _alchemy_rows(self.config)
        for number, row in enumerate(found, 1):
            if number > wanted.stop:
                return
            if number > wanted.start:
                yield f"{self.describe()}:{number}", row

    def describe(self) -> str:
        """The database and the table, without what may be a password."""
        file = _sqlite_file(self.config.name_or_path)
        shown = file.name if file else re.sub(r"//[^@/]*@", "//", self.config.name_or_path)
        return f"{shown}/{self.config.table}" if self.config.table else shown


def _sqlite_file(url: str) -> Path | None:
    """The file of SQLite that a URL or a path names; None for any other database."""
    if url.startswith(_SQLITE):
        return Path(os.path.expanduser(url.removeprefix(_SQLITE)))
    if "://" not in url and url.endswith(_SQLITE_FILES):
        return Path(os.path.expanduser(url))
    return None


def _quoted(name: str) -> str:
    return ".".join('"' + part.replace('"', '""') + '"' for part in name.split("."))


def _sqlite_rows(file: Path, config: SQLSourceConfig) -> Iterator[dict[str, Any]]:
    import sqlite3

    if not file.is_file():
        raise RecipeError(Problem("does not exist", file=str(file), hint="check the path"))
    try:
        # read only: a query of a recipe changes nothing
        uri = f"{file.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            query = config.query or _sqlite_table(connection, config)
            cursor = connection.execute(query)
            names = _names([entry[0] for entry in cursor.description or []])
            while rows := cursor.fetchmany(_FETCH):
                yield from (dict(zip(names, row, strict=True)) for row in rows)
    except sqlite3.Error as error:
        raise _refused(str(error), config) from None


def _sqlite_table(connection: Any, config: SQLSourceConfig) -> str:
    table = _quoted(config.table)
    columns = connection.execute(f"PRAGMA table_info({table})").fetchall()
    keys = [name for _, name in sorted((c[5], _quoted(c[1])) for c in columns if c[5])]
    kinds = dict(connection.execute("SELECT name, type FROM sqlite_master").fetchall())
    # a table without a key has its row number; a view has neither
    order = (
        config.order_by
        or ", ".join(keys)
        or ("rowid" if kinds.get(config.table) == "table" else "")
    )
    if columns and not order:
        raise _unordered(config)
    return f"SELECT * FROM {table} ORDER BY {order or 1}"


def _alchemy_rows(config: SQLSourceConfig) -> Iterator[dict[str, Any]]:
    try:
        import sqlalchemy
    except ImportError:
        raise RecipeError(_needs_sqlalchemy(config.name_or_path)) from None
    try:
        engine = sqlalchemy.create_engine(config.name_or_path)
        with engine.connect() as connection:
            query = sqlalchemy.text(config.query or _alchemy_table(sqlalchemy, engine, config))
            result = connection.execution_options(stream_results=True).execute(query)
            names = _names(list(result.keys()))
            for rows in result.partitions(_FETCH):
                yield from (dict(zip(names, row, strict=True)) for row in rows)
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise _refused(reason, config) from None


def _alchemy_table(sqlalchemy: Any, engine: Any, config: SQLSourceConfig) -> str:
    schema, _, table = config.table.rpartition(".")
    quote = engine.dialect.identifier_preparer.quote
    order = config.order_by
    if not order:
        inspected = sqlalchemy.inspect(engine)
        found = inspected.get_pk_constraint(table, schema=schema or None)
        order = ", ".join(quote(column) for column in found["constrained_columns"])
    if not order:
        raise _unordered(config)
    name = ".".join(quote(part) for part in config.table.split("."))
    return f"SELECT * FROM {name} ORDER BY {order}"


def _names(names: list[str]) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(
            Problem(f"gives the column {twice!r} twice", place="query", hint="name one with AS")
        )
    return names


def _needs_sqlalchemy(url: str) -> Problem:
    kind = url.partition("://")[0]
    return Problem(
        f"is a database of {kind}, which needs the package sqlalchemy and a driver",
        place="name_or_path",
        hint="pip install 'arctic-like[sql]', and the driver of your database",
    )


def _unordered(config: SQLSourceConfig) -> RecipeError:
    message = f"is {config.table!r}, which has no primary key to order its rows by"
    return RecipeError(Problem(message, place="table", hint="say order_by: columns"))


def _refused(reason: str, config: SQLSourceConfig) -> RecipeError:
    place = "query" if config.query else "table"
    return RecipeError(Problem(f"is refused by the database: {reason}", place=place))
