"""A PostgreSQL server of the tests' own: on a Unix socket, in a temporary directory, gone with its owner."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "QUIT")
# What a process has written survives the process: only a loss of power needs the disk.
_SETTINGS = {
    "autovacuum": "off",
    "fsync": "off",
    "full_page_writes": "off",
    # The socket is in a directory of its own: no other server is in the way.
    "listen_addresses": "",
    "log_min_messages": "fatal",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "unix_socket_permissions": "0777",
}


def program(name: str) -> Path:
    """Return a program of the newest PostgreSQL that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: path.parts[-3])
    assert found, "PostgreSQL is not installed: apt-get install postgresql"
    return found[-1]


def _user() -> str | None:
    """Return the user that the server runs as: it refuses root."""
    return "postgres" if os.geteuid() == 0 else None


class Postgres:
    """A server. `start` after `kill` goes on with what was committed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._data = home / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def make(self) -> None:
        words = ("--no-sync", "--auth=trust", "--username=om", "--no-instructions", "-D", self._data)
        argv, user = [str(word) for word in (program("initdb"), *words)], _user()
        done = subprocess.run(argv, capture_output=True, text=True, user=user, group=user, check=False)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        options = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        server = [program("postgres"), "-D", self._data, "-k", self.home, *options]
        argv, user = [*_DIES_WITH_PARENT, *map(str, server)], _user()
        with (self.home / "log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, user=user, group=user)
        wait_for(self._answers, within_s=60)

    def kill(self) -> None:
        """End all processes of the server at once; the next start recovers what was committed."""
        if self._process is not None:
            self.freeze()  # else the first process replaces those that are gone
            self.freeze(signal.SIGKILL)
            self._process.wait(60)
            self._process = None

    def freeze(self, number: int = signal.SIGSTOP) -> None:
        """Send all processes of the server a signal; stopped ones keep their connections and answer none."""
        assert self._process is not None
        pid = self._process.pid
        children = ["ps", "-o", "pid=", "--ppid", str(pid)]
        listed = subprocess.run(children, capture_output=True, text=True, check=False)
        for one in (pid, *map(int, listed.stdout.split())):
            with suppress(ProcessLookupError):
                os.kill(one, number)

    def thaw(self) -> None:
        self.freeze(signal.SIGCONT)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql:///{database}?host={self.home}&port=5432&user=om"

    def database(self) -> str:
        """Make an empty database; return its address."""
        self._databases += 1
        name = f"db{self._databases}"
        self.sql("postgres", f"CREATE DATABASE {name}")
        return self.url(name)

    def sql(self, database: str, statement: str) -> list[tuple[Any, ...]]:
        """Run a statement in a database, named or by its address; return its rows."""
        url = database if "://" in database else self.url(database)
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.home / "log").read_text()
        with suppress(psycopg.OperationalError):
            self.sql("postgres", "SELECT 1")
            return True
        return False


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server for the tests of one file."""
    if not Path("/usr/lib/postgresql").is_dir():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres_server() as server:
        yield server


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    """Run a server; it and its files are gone afterwards."""
    # A socket's path has 107 bytes at most: no directory of pytest.
    home = Path(tempfile.mkdtemp(prefix="om-pg-"))
    try:
        if (user := _user()) is not None:
            shutil.chown(home, user, user)
            assert pwd.getpwnam(user).pw_uid != 0
        home.chmod(0o755)
        server = Postgres(home)
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(home, ignore_errors=True)
