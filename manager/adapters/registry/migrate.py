"""`python -m manager.adapters.registry.migrate FILE`: bring one registry to the newest schema.

With `-` in place of the file, the address of a database in PostgreSQL is read from the standard input.

A program of its own, so that Alembic's memory goes when it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, NullPool, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from manager.adapters.registry.opening import connect_existing

_PR_SET_PDEATHSIG = 1  # prctl(2)
URL_ON_STDIN = "-"


def migration_config() -> Config:
    config = Config()
    here = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", here.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def migrate(path: Path) -> None:
    """Run every migration that is missing, in one transaction: all of them are stored or none is."""
    engine = create_engine("sqlite://", creator=lambda: connect_existing(path), poolclass=NullPool)

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    with engine.begin() as connection:
        upgrade(connection)


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Run every migration that is missing up to a revision, within the caller's transaction."""
    config = migration_config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def main() -> None:
    """`FILE [PID]`; PID is the process that started it, when it is not to outlive that one."""
    path, *parent = sys.argv[1:]
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent[0]):
            sys.exit("the process that wanted this is gone")
    try:
        if path == URL_ON_STDIN:
            from manager.adapters.registry.postgres import schema_transaction  # noqa: PLC0415  (an extra)

            with schema_transaction(sys.stdin.read()) as connection:
                upgrade(connection)
        else:
            migrate(Path(path))
    except SQLAlchemyError as exc:
        sys.exit(str(getattr(exc, "orig", None) or exc).splitlines()[0])  # never the statement


if __name__ == "__main__":
    main()
