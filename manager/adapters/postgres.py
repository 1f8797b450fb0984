"""PostgreSQL: connections whose calls end in time, what its errors mean, and its advisory locks.

What is imported here is installed with the extra `postgresql`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import structlog
from psycopg.types.string import StrDumperUnknown

from manager.errors import ManagerError, RegistryCorruptError, RegistryUnwritableError
from manager.settings.addresses import without_password

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future

T = TypeVar("T")

_log = structlog.get_logger("database")

_CONNECT_S = 3
# A statement may take so long, and wait so long for another gateway.
_STATEMENT_S = 5.0
# A whole call may; a server that does not say a word is not asked any longer.
_CALL_S = 8.0
_WATCH_S = 0.5
# After a failure, calls fail at once for so long: those that wait in a queue are not to wait one by one.
_PAUSE_S = 0.5
_HEARTBEAT_S = 1.0
_APPLICATION = "ollama-manager"
# A gateway that stands still within a transaction must not keep all others from the ledger. One whose
# machine is gone has lost its locks after 20 s.
_SESSION = {
    "statement_timeout": f"{_STATEMENT_S:g}s",
    "lock_timeout": f"{_STATEMENT_S:g}s",
    "idle_in_transaction_session_timeout": f"{_CALL_S:g}s",
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "timezone": "UTC",
}

# https://www.postgresql.org/docs/current/errcodes-appendix.html: what says something about the server, the
# network or another gateway, not about the content of the database. The longest prefix counts.
_CIRCUMSTANCES = {
    "08": "the connection was lost",
    "25006": "it is read-only",
    "25P": "the transaction took too long",
    "28": "access is denied",
    "3D000": "there is no such database",
    "3F": "there is no schema to use",
    "40": "another gateway was in the way",
    "42501": "access is denied",
    "53": "the server has no resources left",
    "53100": "the disk is full",
    "55P03": "another gateway has it locked",
    "57": "the server has ended the call",
    "57014": "the call took too long",
    "57P01": "the server is shutting down",
    "57P03": "the server is starting or shutting down",
    "58": "the server reports an error of its system",
}


def lock_key(name: str) -> int:
    """Return the number that stands for a name of a lock: 64 bits, with a sign."""
    digest = hashlib.blake2b(f"ollama-manager\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def name_of(url: str) -> str:
    """Return what errors and the log call a database: its address without passwords and options."""
    return without_password(url).partition("?")[0]


class _Text(StrDumperUnknown):
    """Escapes the one character that PostgreSQL has no form for."""

    def dump(self, obj: str) -> Any:
        return super().dump(obj.replace("\0", "\\x00") if "\0" in obj else obj)


def connect(url: str, *, statement_s: float = _STATEMENT_S, autocommit: bool = True) -> psycopg.Connection:
    """Return a connection, which is made within seconds or fails.

    Args:
        url: of the database.
        statement_s: how long a statement may take, and wait for a lock.
        autocommit: as psycopg has it.

    Raises:
        psycopg.OperationalError: there is none.
    """
    limit = f"{statement_s:g}s"
    settings = {**_SESSION, "statement_timeout": limit, "lock_timeout": limit}
    connection = psycopg.connect(
        url,
        autocommit=autocommit,
        connect_timeout=_CONNECT_S,
        application_name=_APPLICATION,
        keepalives=1,
        keepalives_idle=5,
        keepalives_interval=2,
        keepalives_count=3,
        tcp_user_timeout=int(_CALL_S * 1000),
        client_encoding="utf8",
        options=" ".join(f"-c {key}={value}" for key, value in settings.items()),
    )
    connection.adapters.register_dumper(str, _Text)
    return connection


def circumstance(error: BaseException | None) -> str | None:
    """Return what the server, the network or another gateway did to a call; None: the content is at fault."""
    state: str = getattr(error, "sqlstate", None) or ""
    for length in range(len(state), 1, -1):
        if (words := _CIRCUMSTANCES.get(state[:length])) is not None:
            return words
    if not state and isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return "there is no connection"
    return None


def refusal(name: str, problem: str) -> RegistryCorruptError:
    """Return the error for a database that cannot be used."""
    message = f"the registry {name} cannot be used: {problem}. It was left as it is"
    return RegistryCorruptError(message, details={"database": name, "problem": problem})


def translated(
    name: str, error: BaseException | None, doing: str
) -> RegistryCorruptError | RegistryUnwritableError:
    """Return the meaning of an error of PostgreSQL."""
    said = " ".join(str(error).split())
    words = circumstance(error)
    if words is None:
        return refusal(name, said)
    return RegistryUnwritableError(f"the registry {name} could not be {doing}: {words} ({said})")


class PostgresThread:
    """One connection, and the thread that uses it. The first call makes it, and each one after a loss.

    Args:
        url: of the database.
        name: of the thread.
        autocommit: as psycopg has it.
    """

    def __init__(self, url: str, name: str, *, autocommit: bool = True) -> None:
        self.name = name_of(url)
        self._url = url
        self._autocommit = autocommit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._connection: psycopg.Connection | None = None
        self._began: float | None = None
        self._failed: tuple[float, str] = (float("-inf"), "")
        self._last: Future[None] | None = None

    async def call(self, work: Callable[[], T], *, doing: str = "written") -> T:
        """Run `work` in the thread; `doing` is what an error says could not be done.

        A call that is cancelled either happens completely or not at all.

        Raises:
            RegistryCorruptError, RegistryUnwritableError: PostgreSQL refused, or did not answer in time.
        """
        if self._last is not None:
            raise RegistryUnwritableError(f"the registry {self.name} is closed")

        def run() -> T:
            self._began = time.monotonic()
            try:
                return work()
            except psycopg.Error as error:
                raise translated(self.name, error, doing) from error
            finally:
                self._began = None

        running = asyncio.get_running_loop().run_in_executor(self._thread, run)
        try:
            while not (await asyncio.wait((running,), timeout=_WATCH_S))[0]:
                self._end_overdue()
        except asyncio.CancelledError:
            running.cancel()
            running.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        return running.result()

    def connect(self) -> psycopg.Connection:
        """Return a new connection, in place of the earlier one; only within `call`."""
        failed_at, why = self._failed
        if time.monotonic() - failed_at < _PAUSE_S:
            raise psycopg.OperationalError(why)
        try:
            self._connection = connect(self._url, autocommit=self._autocommit)
        except psycopg.Error as error:
            self._failed = (time.monotonic(), str(error))
            raise
        return self._connection

    def open(self) -> psycopg.Connection:
        """Return the connection; only within `call`."""
        connection = self._connection
        if connection is not None and _was_left(connection):
            self.drop()
            connection = None
        return self.connect() if connection is None else connection

    def current(self) -> psycopg.Connection | None:
        """Return the connection that there is already; None where it is closed. Only within `call`."""
        connection = self._connection
        return None if connection is None or connection.closed else connection

    def drop(self) -> None:
        """Close the connection; the next call makes another one. Only within `call`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def abandon(self, close: Callable[[], None] | None = None) -> Future[None]:
        """Close after the calls under way, without waiting; a second time is no error."""
        if self._last is None:
            self._last = self._thread.submit(self.drop if close is None else close)
            self._thread.shutdown(wait=False)
        return self._last

    async def close(self, close: Callable[[], None] | None = None) -> None:
        """End after the calls that are under way, which end in time; closing twice is no error."""
        ending = asyncio.wrap_future(self.abandon(close))
        while not (await asyncio.wait((ending,), timeout=_WATCH_S))[0]:
            self._end_overdue()
        ending.result()

    def _end_overdue(self) -> None:
        """End the connection of a call that takes too long: its thread would wait without a limit."""
        began, connection = self._began, self._connection
        if began is None or connection is None or time.monotonic() - began < _CALL_S:
            return
        with suppress(psycopg.Error, OSError), socket.socket(fileno=os.dup(connection.fileno())) as copy:
            copy.shutdown(socket.SHUT_RDWR)


def _was_left(connection: psycopg.Connection) -> bool:
    """Whether the connection is of no use: it is closed, or the server has said so meanwhile."""
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


class AdvisoryLocks:
    """Advisory locks of one session, on a connection of its own, for as long as that lives.

    A lock is one of this object: what it holds exclusively it does not get a second time, and what it holds
    shared counts, so that each holder releases its own share. Between objects and processes PostgreSQL
    decides. All locks are gone at once when the connection is lost; the object can be used again after that.

    The server frees the locks of a process that was killed at once, and of a machine that is gone after 20 s.
    A holder that is cut off from the server may learn it up to 10 s after the server has given its lock away:
    locks save work done twice, and do not replace a check where such work would do harm.

    Args:
        url: of the database.
        on_lost: called on the event loop with the names that were held when the connection was lost. What
            they protect must end now.
    """

    def __init__(self, url: str, *, on_lost: Callable[[frozenset[str]], None] = lambda _names: None) -> None:
        self._thread = PostgresThread(url, "locks")
        self._on_lost = on_lost
        self._exclusive: set[str] = set()
        self._shared: Counter[str] = Counter()
        self._turn = asyncio.Lock()
        self._heartbeat: asyncio.Task[None] | None = None
        self._rests: set[asyncio.Future[None]] = set()

    @property
    def held(self) -> frozenset[str]:
        """The names that are held now, in either way."""
        return frozenset((*self._exclusive, *self._shared))

    async def try_exclusive(self, name: str) -> bool:
        """Take a lock that nobody else has; return whether it was taken. Does not wait for other holders.

        A call that is cancelled leaves it free.

        Raises:
            RegistryUnwritableError: the database is away; the lock is not held.
        """
        return await self._whole(self._take(name), undo=lambda: self._release(name))

    async def try_shared(self, name: str) -> bool:
        """Take a share of a lock that nobody has exclusively; as `try_exclusive`."""
        return await self._whole(self._take_share(name), undo=lambda: self._release_share(name))

    async def release(self, name: str, *, shared: bool = False) -> bool:
        """Give a lock back; return whether it was held until now. One that was lost is no error.

        Raises:
            RegistryUnwritableError: the database is away. The lock is lost, as all others are.
        """
        return await self._whole(self._release_share(name) if shared else self._release(name))

    async def close(self) -> None:
        """Give all locks back; `on_lost` is not called. Closing twice is no error."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            with suppress(asyncio.CancelledError):
                await self._heartbeat
        self._exclusive.clear()
        self._shared.clear()
        await self._thread.close()

    async def _take(self, name: str) -> bool:
        async with self._turn:
            if name in self._exclusive or name in self._shared:
                return False
            taken = await self._ask("pg_try_advisory_lock", name)
            if taken:
                self._exclusive.add(name)
            return taken

    async def _take_share(self, name: str) -> bool:
        async with self._turn:
            if name in self._exclusive:
                return False
            taken = name in self._shared or await self._ask("pg_try_advisory_lock_shared", name)
            if taken:
                self._shared[name] += 1
            return taken

    async def _release(self, name: str) -> bool:
        async with self._turn:
            if name not in self._exclusive:
                return False
            freed = await self._ask("pg_advisory_unlock", name)
            self._exclusive.discard(name)
            return freed

    async def _release_share(self, name: str) -> bool:
        async with self._turn:
            if name not in self._shared:
                return False
            if self._shared[name] > 1:
                self._shared[name] -= 1
                return True
            freed = await self._ask("pg_advisory_unlock_shared", name)
            del self._shared[name]
            return freed

    async def _whole(
        self, work: Coroutine[Any, Any, bool], undo: Callable[[], Coroutine[Any, Any, bool]] | None = None
    ) -> bool:
        """Do the work to its end although the caller is cancelled, and undo it then."""
        working = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            rest = asyncio.ensure_future(_undone(working, undo))
            self._rests.add(rest)
            rest.add_done_callback(self._rests.discard)
            raise

    async def _ask(self, function: str, name: str) -> bool:
        """Call a function of PostgreSQL on the connection that has the locks.

        Raises:
            RegistryUnwritableError: it could not be asked. The connection is closed, and all locks are lost.
        """
        statement, key = f"SELECT {function}(%s)".encode(), lock_key(name)
        found = await self._use(lambda connection: connection.execute(statement, (key,)).fetchone())
        if self._heartbeat is None or self._heartbeat.done():
            self._heartbeat = asyncio.create_task(self._beat(), name="locks in the database")
        return found is not None and bool(found[0])

    async def _use(self, work: Callable[[psycopg.Connection], T]) -> T:
        def run() -> T:
            try:
                return work(self._connection())
            except BaseException:
                # The session may have got a lock although the answer did not come.
                self._thread.drop()
                raise

        try:
            return await self._thread.call(run, doing="locked")
        except ManagerError:
            self._lose()
            raise

    def _connection(self) -> psycopg.Connection:
        """Return the connection that has the locks; a new one only where none is held."""
        if not self.held:
            return self._thread.open()
        connection = self._thread.current()
        if connection is None:
            raise psycopg.OperationalError("the connection with the locks was lost")
        return connection

    async def _beat(self) -> None:
        """Look whether the connection lives, for as long as a lock is held."""
        while self.held:
            await asyncio.sleep(_HEARTBEAT_S)
            async with self._turn:
                if not self.held:
                    return
                try:
                    await self._use(lambda connection: connection.execute("SELECT 1"))
                except ManagerError as error:
                    _log.warning("locks_lost", error=error.message)

    def _lose(self) -> None:
        held = self.held
        self._exclusive.clear()
        self._shared.clear()
        if held:
            self._on_lost(held)


async def _undone(
    working: asyncio.Future[bool], undo: Callable[[], Coroutine[Any, Any, bool]] | None
) -> None:
    with suppress(ManagerError):  # then it is lost, which is as good
        if await working and undo is not None:
            await undo()
