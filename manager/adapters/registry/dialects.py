"""The differences of SQLite and PostgreSQL in the statements and the schema of the registry."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Integer

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData, Table, TextClause
    from sqlalchemy.dialects import postgresql, sqlite

# Whole numbers have 64 bits everywhere: times in microseconds and sums of money need them. SQLite's INTEGER
# has them, and no other name makes a column an alias of its row id.
Whole = BigInteger().with_variant(Integer(), "sqlite")


def only_where(condition: TextClause) -> dict[str, Any]:
    """Return the options of an index, in a migration, that has only the rows of a condition."""
    return {"sqlite_where": condition, "postgresql_where": condition}


def conditions_for_postgresql(metadata: MetaData) -> None:
    """Give the indexes of a schema the conditions that they have for SQLite.

    Options of a dialect import it, which SQLite alone must not pay for: so they are added here.
    """
    for table in metadata.tables.values():
        for index in table.indexes:
            index.dialect_options["postgresql"]["where"] = index.dialect_options["sqlite"]["where"]


def upsert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return the statement that stores a row in place of one with the same primary key."""
    return _upsert(connection.dialect.name, table)


def insert_new(connection: Connection, table: Table) -> Any:
    """Return the statement that stores a row, unless there is one with the same primary key."""
    return _insert(connection.dialect.name)(table).on_conflict_do_nothing()


def insert_or(connection: Connection, table: Table) -> Any:
    """Return an insert that can be given `on_conflict_do_update`."""
    return _insert(connection.dialect.name)(table)


@cache
def _upsert(dialect: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    statement = _insert(dialect)(table)
    changed = {column.name: statement.excluded[column.name] for column in table.c if not column.primary_key}
    result: sqlite.Insert | postgresql.Insert = statement.on_conflict_do_update(
        index_elements=list(table.primary_key), set_=changed
    )
    return result


def _insert(dialect: str) -> Any:
    # Each is imported where it is used: the other one costs a start time and memory.
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as insert_postgresql  # noqa: PLC0415

        return insert_postgresql
    from sqlalchemy.dialects.sqlite import insert as insert_sqlite  # noqa: PLC0415

    return insert_sqlite
