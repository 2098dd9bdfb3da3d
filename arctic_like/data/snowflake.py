"""Snowflake's tables, queries and data sets: known by ArcticTraining's recipes, not read here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from arctic_like.config.values import HumanInt
from arctic_like.data.base import DataSource, ReadRow, SourceConfig
from arctic_like.errors import Problem, RecipeError

_INSTEAD = (
    "read it with `type: sql` and `name_or_path: snowflake://…` (pip install "
    "snowflake-sqlalchemy), or export it to parquet"
)


class SnowflakeSourceConfig(SourceConfig):
    """Data of Snowflake. Accepted in recipes, refused before a run."""

    not_yet: ClassVar[dict[str, str]] = {
        "sql": _INSTEAD, "table_name": _INSTEAD, "dataset_uri": _INSTEAD,
    }  # fmt: skip

    type: str = "snowflake"

    sql: str = ""
    """A query. Not built."""

    table_name: str = ""
    """A table. Not built."""

    dataset_uri: str = ""
    """A data set: `snow://dataset/name/versions/version`. Not built."""

    column_mapping: dict[str, str] = Field(default_factory=dict)
    """Other names of columns, there → here."""

    limit: HumanInt | None = Field(default=None, ge=1)
    """Most rows to read."""

    batch_size: HumanInt = Field(default=1024, ge=1)
    """Rows that are fetched at a time."""


class SnowflakeSource(DataSource):
    """`type: snowflake`: declared, so that ArcticTraining's recipes validate; use `type: sql`."""

    name = "snowflake"
    config_type = SnowflakeSourceConfig
    config: SnowflakeSourceConfig

    def problems(self) -> list[Problem]:
        """That it is not built."""
        return [Problem("is 'snowflake', which is not built", place="type", hint=_INSTEAD)]

    def rows(self) -> Iterator[ReadRow]:
        raise RecipeError(self.problems())


class SnowflakeTableSource(SnowflakeSource):
    """`type: snowflake_table`: declared; use `type: sql`."""

    name = "snowflake_table"


class SnowflakeDatasetSource(SnowflakeSource):
    """`type: snowflake_dataset`: declared; export the data set to parquet."""

    name = "snowflake_dataset"
