"""From a path to a registry file that can be used: checked, of the newest schema, created if it is missing.

Nothing here changes a file that it refuses. All of it blocks, and expects that the caller holds the state
directory's lock: a file that another process writes meanwhile would look broken.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from manager.adapters.registry.log import wal_gap, wal_problem
from manager.adapters.registry.tables import HEAD, REVISIONS, metadata
from manager.errors import RegistryCorruptError, RegistryUnwritableError
from manager.settings.ownership import state_file_problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy import Connection

# https://www.sqlite.org/fileformat2.html: the first bytes of a database.
_HEADER = b"SQLite format 3\x00"
_COMPANIONS = ("-wal", "-shm", "-journal")
REGISTRY = "the registry"
_MIGRATION_TIMEOUT_S = 120
_HISTORY = "requests"
_WHOLLY_CHECKED_BYTES = 64 * 2**20
_MOST_PROBLEMS = 3


def prepare(path: Path) -> None:
    """Leave a registry of the newest schema at `path`.

    Raises:
        RegistryCorruptError: what is there cannot be used; it is left exactly as it is.
        RegistryUnwritableError: it could not be read, created or brought up to date.
    """
    try:
        if os.path.lexists(path):
            if verify(path) != HEAD:
                run_migrations(str(path), str(path))
        else:
            create_whole(path, _build)
    except DBAPIError as exc:
        raise translated(path, exc.orig, "created") from exc
    except OSError as exc:
        raise RegistryUnwritableError(f"the registry {path} cannot be opened: {exc.strerror or exc}") from exc


def connect_existing(path: Path, busy_timeout_s: float = 5.0) -> sqlite3.Connection:
    """A connection that never creates the file, and begins no transaction by itself."""
    return sqlite3.connect(file_uri(path, "mode=rw"), uri=True, timeout=busy_timeout_s, isolation_level=None)


def refusal(path: Path, problem: str, what: str = REGISTRY) -> RegistryCorruptError:
    """The error for a file that cannot be used, with the command that sets it aside."""
    aside = f"{path}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    moves = [
        shlex.join(["mv", "-n", f"{path}{suffix}", f"{aside}{suffix}"])
        for suffix in ("", *_COMPANIONS)
        if os.path.lexists(f"{path}{suffix}")
    ]
    command = " && ".join(moves)
    return RegistryCorruptError(
        f"{what} {path} cannot be used: {problem}. It was left as it is. "
        f"To set it aside and begin with an empty one: {command}",
        details={"path": str(path), "problem": problem, "command": command},
    )


# What SQLite says about the disk, the file system or another process, not about the content of the file.
_CIRCUMSTANCES = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "it is read-only",
    sqlite3.SQLITE_BUSY: "another process has it locked",
    sqlite3.SQLITE_LOCKED: "another process has it locked",
    sqlite3.SQLITE_IOERR: "the disk reports an error",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened",
    sqlite3.SQLITE_PERM: "access is denied",
    sqlite3.SQLITE_AUTH: "access is denied",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
    sqlite3.SQLITE_PROTOCOL: "another process has it locked",
    sqlite3.SQLITE_INTERRUPT: "the call was interrupted",
    sqlite3.SQLITE_TOOBIG: "a value is too long",
}


def translated(
    path: Path, exc: BaseException | None, doing: str, what: str = REGISTRY
) -> RegistryCorruptError | RegistryUnwritableError:
    """The meaning of an error of SQLite: its circumstances are against us, or the file itself is bad."""
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the rest refines it
    if code in _CIRCUMSTANCES:
        return RegistryUnwritableError(f"{what} {path} could not be {doing}: {_CIRCUMSTANCES[code]} ({exc})")
    return refusal(path, str(exc), what)


def verify(path: Path) -> str:
    """Check the file and return the revision of its schema.

    Raises:
        RegistryCorruptError: it cannot be used.
        RegistryUnwritableError, OSError: it cannot be read.
    """
    wal = refuse_other_files(path)
    try:
        with _readable(path) as connection:
            if wal is not None and (problem := wal_gap(connection, wal)):
                raise refusal(path, problem)
            if problems := _problems(connection, size_of(str(path))):
                raise refusal(path, "; ".join(problems))
            if not connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
            ).fetchone():
                raise refusal(path, "it is a database of some other program")
            revisions = [str(row[0]) for row in connection.execute("SELECT version_num FROM alembic_version")]
    except sqlite3.Error as exc:
        raise translated(path, exc, "read") from exc
    if problem := revision_problem(revisions):
        raise refusal(path, problem)
    return revisions[0]


def revision_problem(revisions: Sequence[str]) -> str | None:
    """Return what is wrong with the revisions that a database names; None where it can be used."""
    if len(revisions) != 1:
        return f"it names {len(revisions)} revisions of its schema instead of one"
    if revisions[0] not in REVISIONS:
        return (
            f"its schema has the revision {revisions[0]}, this version knows no newer one than {HEAD}: "
            "it was written by a newer version, which can still read it"
        )
    return None


def _problems(connection: sqlite3.Connection, size_bytes: int) -> list[str]:
    """Return what a check of the structure finds, a few problems at most.

    In a large file all but the history of requests is checked: a start must not take the longer the more of
    it there is (2 s for a million), and nothing that the daemon decides depends on it.
    """
    checks = ["PRAGMA quick_check(3)"]
    if size_bytes > _WHOLLY_CHECKED_BYTES:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        names = ["sqlite_master", *(name for (name,) in found if name != _HISTORY)]
        checks = [f"PRAGMA quick_check('{name}')" for name in names]
    rows = (str(row[0]) for check in checks for row in connection.execute(check))
    return [row for row in rows if row != "ok"][:_MOST_PROBLEMS]


def refuse_other_files(path: Path, what: str = REGISTRY) -> Path | None:
    """Refuse a file that is no database of ours by its look; return its write-ahead log, None if it is empty.

    Raises:
        RegistryCorruptError: it is odd, empty or no SQLite database, or the header of its log is damaged.
        OSError: it cannot be read.
    """
    _refuse_odd_files(path, what)
    with path.open("rb") as file:
        header = file.read(len(_HEADER))
    if not header:
        raise refusal(path, "it is empty", what)
    if header != _HEADER:
        raise refusal(path, "it is not an SQLite database", what)
    wal = Path(f"{path}-wal") if size_of(f"{path}-wal") else None
    if wal is not None and (problem := wal_problem(wal)):
        raise refusal(path, problem, what)
    return wal


def _refuse_odd_files(path: Path, what: str) -> None:
    """Refuse what SQLite would follow, wait for or share: links, FIFOs, second names, files of others."""
    for suffix in ("", *_COMPANIONS):
        if problem := state_file_problem(Path(f"{path}{suffix}")):
            raise refusal(path, problem, what)


@contextmanager
def _readable(path: Path) -> Iterator[sqlite3.Connection]:
    """The content, without a byte of the file or its companions being changed.

    Reading a write-ahead log makes SQLite write: into the index beside it, and on closing into the file.
    So a file that was not closed is read from a copy; otherwise the file itself is declared immutable.
    """
    left = [suffix for suffix in ("-wal", "-journal") if size_of(f"{path}{suffix}")]
    if not left:
        with closing(sqlite3.connect(file_uri(path, "immutable=1"), uri=True)) as connection:
            yield connection
        return
    with tempfile.TemporaryDirectory(prefix="ollama-manager-") as directory:
        copy = Path(directory, "registry")
        for suffix in ("", *left):
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        with closing(sqlite3.connect(copy)) as connection:
            yield connection


def file_uri(path: Path, option: str) -> str:
    """Return what `sqlite3.connect(uri=True)` opens."""
    return f"file:{quote(str(path.absolute()))}?{option}"


def size_of(path: str) -> int:
    """Return the size of a file in bytes, 0 where there is none."""
    try:
        return Path(path).stat().st_size
    except FileNotFoundError:
        return 0


def create_whole(path: Path, build: Callable[[Path], None], what: str = REGISTRY) -> None:
    """Build the file under another name, then rename it: it is there whole or not at all.

    Args:
        path: of the file, which does not exist.
        build: fills an empty file, and closes it.
        what: names the file in errors.

    Raises:
        RegistryCorruptError: a write-ahead log of another file is beside it.
        OSError, sqlite3.Error, DBAPIError: it could not be created.
    """
    _refuse_odd_files(path, what)
    for suffix in ("-wal", "-journal"):
        if size_of(f"{path}{suffix}"):
            # SQLite would play it back into the new file.
            raise refusal(path, f"it is missing, but what was last written to it is in {path}{suffix}", what)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    prefix = f".{path.name}.new-"
    for leftover in path.parent.glob(f"{prefix}*"):
        leftover.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)  # mode 0600
    os.close(descriptor)
    new = Path(name)
    try:
        build(new)
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _build(path: Path) -> None:
    """The newest schema in an empty file, marked as such; a test compares it with the migrations."""
    engine = create_engine("sqlite://", creator=lambda: connect_existing(path), poolclass=NullPool)
    with engine.begin() as connection:
        create_schema(connection)


def create_schema(connection: Connection) -> None:
    """Make all tables of the newest schema, and say which one it is, within the caller's transaction."""
    metadata.create_all(connection)
    connection.exec_driver_sql(
        "CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, "
        "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
    )
    connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


def run_migrations(name: str, argument: str, *, url: str | None = None) -> None:
    """Run Alembic, in a process of its own: it would cost the daemon memory for as long as it lives.

    Args:
        name: of the database, for errors.
        argument: the file, or `migrate.URL_ON_STDIN`.
        url: of a database in PostgreSQL. It may have a password, which no list of processes is to show.

    Raises:
        RegistryUnwritableError: it failed; nothing has changed.
    """
    argv = [sys.executable, "-P", "-m", "manager.adapters.registry.migrate", argument, str(os.getpid())]
    try:
        done = subprocess.run(  # noqa: S603  (our own program)
            argv,
            input=url or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_MIGRATION_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise RegistryUnwritableError(
            f"the registry {name} was not brought to schema {HEAD} within {_MIGRATION_TIMEOUT_S} s"
        ) from exc
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise RegistryUnwritableError(
            f"the registry {name} could not be brought to schema {HEAD}: {said[-1]}"
        )
