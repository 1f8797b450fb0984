"""The way to what needs the extra `postgresql`, which is imported only where a database is named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.errors import ConfigurationError

if TYPE_CHECKING:
    from manager.adapters.registry.postgres import PostgresDatabase


def database_at(url: str) -> PostgresDatabase:
    """Return the database that gateways share; nothing is connected yet.

    Raises:
        ConfigurationError: what talks to PostgreSQL is not installed.
    """
    try:
        from manager.adapters.registry.postgres import PostgresDatabase  # noqa: PLC0415
    except ImportError as error:  # it is not there, or finds no libpq
        message = (
            "state.url: psycopg is not installed, which talks to PostgreSQL; "
            "run: pip install 'ollama-endpoint-manager[postgresql]'"
        )
        raise ConfigurationError(message) from error
    return PostgresDatabase(url)
