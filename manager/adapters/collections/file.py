"""From a path to a file of collections that can be used. Nothing here changes a file that it refuses.

All of it blocks, and expects that the caller holds the state directory's lock.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import struct
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manager.adapters.collections.schema import APPLICATION_ID, SCHEMA_NUMBER, build
from manager.adapters.registry.log import frames_read, gap_behind
from manager.adapters.registry.opening import (
    create_whole,
    file_uri,
    refusal,
    refuse_other_files,
    size_of,
    translated,
)
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Names the file in errors.
WHAT: Final = "the file of collections"
_WHOLLY_CHECKED_BYTES = 64 * 2**20
# In a large file only these are checked: a start must not take the longer the more items there are.
_SMALL_TABLES = ("sqlite_master", "meta", "collections", "versions", "backfills", "removed")
_MOST_PROBLEMS = 3
# The schema is in the first pages: it is written once, when the file is made.
_HEAD_BYTES = 2**20
# https://www.sqlite.org/fileformat2.html: the number of the schema, the encoder's version, the application.
_NUMBERS_AT = slice(60, 72)
_NUMBERS = struct.Struct(">i4xi")


def verify(path: Path) -> bool:
    """Check the file; return whether it is there.

    Raises:
        RegistryCorruptError: it cannot be used; it is left as it is.
        RegistryUnwritableError: it cannot be read.
    """
    if not os.path.lexists(path):
        return False
    try:
        wal = refuse_other_files(path, WHAT)
        with path.open("rb") as file:
            number, owner = _NUMBERS.unpack(file.read(_HEAD_BYTES)[_NUMBERS_AT].ljust(_NUMBERS.size, b"\0"))
        if problem := _foreign(owner, number):
            raise refusal(path, problem, WHAT)
        if wal is not None and (problem := _gap(path, wal)):
            raise refusal(path, problem, WHAT)
        with _readable(path, wal) as connection:
            problem = _problem(connection, size_of(str(path)))
    except sqlite3.Error as error:
        raise translated(path, error, "read", WHAT) from error
    except OSError as error:
        raise RegistryUnwritableError(f"{WHAT} {path} cannot be opened: {error.strerror or error}") from error
    if problem:
        raise refusal(path, problem, WHAT)
    return True


def create(path: Path, first_version: int) -> None:
    """Make the file, whole or not at all.

    Raises:
        RegistryCorruptError, RegistryUnwritableError: it could not be made.
    """
    try:
        if os.path.lexists(path):
            raise RegistryUnwritableError(
                f"{WHAT} {path} was put there meanwhile; restart the daemon to use it"
            )
        create_whole(path, lambda new: build(new, first_version), WHAT)
    except sqlite3.Error as error:
        raise translated(path, error, "created", WHAT) from error
    except OSError as error:
        raise RegistryUnwritableError(f"{WHAT} {path} cannot be made: {error.strerror or error}") from error


def _foreign(owner: int, number: int) -> str | None:
    """Return why a database with this application id and number of its schema is not ours to read."""
    if owner != APPLICATION_ID:
        return "it is a database of some other program"
    if number > SCHEMA_NUMBER:
        return (
            f"its schema has the number {number}, this version knows no newer one than {SCHEMA_NUMBER}: "
            "it was written by a newer version, which can still read it"
        )
    if number < 1:
        return f"its schema has the number {number}; expected {SCHEMA_NUMBER}"
    return None


def _problem(connection: sqlite3.Connection, size_bytes: int) -> str | None:
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (number,) = connection.execute("PRAGMA user_version").fetchone()
    if problem := _foreign(owner, number):
        return problem
    checks = ["PRAGMA quick_check(3)"]
    if size_bytes > _WHOLLY_CHECKED_BYTES:
        checks = [f"PRAGMA quick_check('{name}')" for name in _SMALL_TABLES]
    rows = (str(row[0]) for check in checks for row in connection.execute(check))
    problems = [row for row in rows if row != "ok"][:_MOST_PROBLEMS]
    if not problems:
        (notes,) = connection.execute("SELECT count(*) FROM meta").fetchone()
        problems = [] if notes == 1 else [f"its table meta has {notes} rows instead of one"]
    return "; ".join(problems) or None


def _gap(path: Path, wal: Path) -> str | None:
    """Return the reason why SQLite would read less of the log than was finished.

    SQLite changes what it looks at: this is a copy, of the log and the first pages; the file may be large.
    """
    with tempfile.TemporaryDirectory(prefix="ollama-manager-") as directory:
        copy = Path(directory, "collections")
        with path.open("rb") as file:
            copy.write_bytes(file.read(_HEAD_BYTES))
        os.truncate(copy, size_of(str(path)))
        shutil.copyfile(wal, f"{copy}-wal")
        return gap_behind(frames_read(copy), wal)


@contextmanager
def _readable(path: Path, wal: Path | None) -> Iterator[sqlite3.Connection]:
    """The content. Neither the file nor its log is changed; for a log, SQLite makes an index beside it.

    Where a copy by SQLite, which has no log, was just being given one, SQLite undoes that.
    """
    option = "immutable=1" if wal is None else "mode=ro"
    if size_of(f"{path}-journal"):
        option = "mode=rw"
    with closing(sqlite3.connect(file_uri(path, option), uri=True)) as connection:
        yield connection
