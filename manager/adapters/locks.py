"""Exclusion between tasks and between processes, through filelock; the only file that imports it.

The kernel gives a lock back when its holder dies, however it dies. The files stay: unlinking one would let
two processes hold "the same" lock. They need a local file system that has flock(2), which NFS may not be.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from filelock import FileLock, Timeout

from manager.errors import ConfigurationError, LockedError, Reason, StateDirHeldError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_log = structlog.get_logger("locks")

_POLL_S = 0.05
# A command that only looks whether a daemon runs holds the lock for an instant.
_GLANCE_S = 0.25


class FileLocks:
    """Implements `services.ports.InstanceLocks` with `<directory>/<instance>.lock`.

    Always in this order: the lock between tasks, then the file, because flock(2) cannot tell two tasks of one
    process apart from one that asks twice.

    Args:
        directory: created when missing.
        wait_s: how long to wait for another process; other tasks are waited for as long as they take.
    """

    def __init__(self, directory: Path, wait_s: float) -> None:
        self._directory = directory
        self._wait_s = wait_s
        self._between_tasks: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def hold(self, instance_id: str) -> AsyncIterator[None]:
        """Hold an instance. A task that is cancelled, wherever it is, leaves nothing held.

        Raises:
            LockedError: another process held it for longer than `wait_s`.
            UnavailableError: the lock file cannot be opened.
        """
        async with self._between_tasks.setdefault(instance_id, asyncio.Lock()):
            lock = await self._locked(instance_id)
            try:
                yield
            finally:
                lock.release()

    async def _locked(self, instance_id: str) -> FileLock:
        path = self._directory / f"{instance_id}.lock"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _lock(path)
            while not _try(lock):
                left_s = deadline - loop.time()
                if left_s <= 0:
                    pid = holder_pid(path)
                    raise LockedError(
                        f"instance {instance_id} is held by {_named(pid)}, which did not let go of {path} "
                        f"within {self._wait_s:g} s",
                        instance=instance_id,
                        details={"lock": str(path), "pid": pid},
                        retry_after_s=self._wait_s,
                    )
                await asyncio.sleep(min(_POLL_S, left_s))
        except OSError as exc:
            raise UnavailableError(
                f"the lock of instance {instance_id} cannot be taken: {exc}",
                reason=Reason.START_FAILED,
                instance=instance_id,
            ) from exc
        return lock


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a state directory, as far as it is known. `started_at` is UTC."""

    pid: int | None = None
    url: str | None = None
    started_at: datetime | None = None
    manager_id: str | None = None

    def __str__(self) -> str:
        parts = [_named(self.pid)]
        if self.manager_id is not None:
            parts.append(f"manager {self.manager_id!r}")
        if self.url is not None:
            parts.append(self.url)
        if self.started_at is not None:
            parts.append(f"since {self.started_at:%Y-%m-%dT%H:%M:%SZ}")
        return ", ".join(parts)


class StateDirLock:
    """The claim of one daemon to one state directory: `daemon.lock`, and `daemon.json` saying whose it is.

    The description is a file of its own: it is replaced as a whole, and a lock file must never be.
    """

    def __init__(self, state_dir: Path, manager_id: str) -> None:
        self._state_dir = state_dir
        self._lock = _lock(state_dir / _LOCK)
        self._holder = Holder(manager_id=manager_id)

    def acquire(self) -> None:
        """Claim the directory, creating it when missing; does not wait for another daemon.

        Raises:
            StateDirHeldError: another process holds it; the message says who.
            ConfigurationError: the directory cannot be used.
        """
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            deadline = time.monotonic() + _GLANCE_S
            while not _try(self._lock):
                # Who merely looks whether somebody holds it holds it for a moment too, but shared.
                if time.monotonic() >= deadline and _is_held(self._state_dir / _LOCK):
                    raise self._held()
                time.sleep(_POLL_S)
        except OSError as exc:
            raise ConfigurationError(f"the state directory {self._state_dir} cannot be used: {exc}") from exc
        self._holder = replace(self._holder, pid=os.getpid(), started_at=datetime.now(UTC))
        self._publish()

    def describe(self, *, url: str) -> None:
        """Publish where this daemon listens; called while the lock is held."""
        self._holder = replace(self._holder, url=url)
        self._publish()

    def release(self) -> None:
        """Give the directory back; twice is no error."""
        if self._lock.is_locked:
            with suppress(OSError):
                (self._state_dir / _DESCRIPTION).unlink(missing_ok=True)
            self._lock.release()

    def _held(self) -> StateDirHeldError:
        holder = read_holder(self._state_dir) or Holder()
        return StateDirHeldError(
            f"the state directory {self._state_dir} is in use by {holder}", details=_described(holder)
        )

    def _publish(self) -> None:
        """Replace the description. Without one the lock still holds: a full disk must not stop the daemon."""
        path = self._state_dir / _DESCRIPTION
        new = path.with_suffix(".json.new")
        try:
            # First of all: what a dead daemon said of itself is worse than nothing.
            path.unlink(missing_ok=True)
            new.touch(mode=0o600)
            new.write_text(json.dumps(_described(self._holder)) + "\n", encoding="utf-8")
            new.replace(path)
        except OSError as exc:
            _log.warning("daemon_not_described", path=str(path), error=str(exc))


_LOCK = "daemon.lock"
_DESCRIPTION = "daemon.json"


def read_holder(state_dir: Path) -> Holder | None:
    """Who holds the state directory now, None when nobody does: what a dead daemon left behind is ignored.

    Creates and changes nothing.

    Raises:
        ConfigurationError: the directory cannot be read.
    """
    path = state_dir / _LOCK
    try:
        if not _is_held(path):
            return None
        holder = _read_description(state_dir / _DESCRIPTION)
    except OSError as exc:
        raise ConfigurationError(f"the state directory {state_dir} cannot be read: {exc}") from exc
    return holder or Holder(pid=holder_pid(path))


def holder_pid(path: Path) -> int | None:
    """The process that holds a lock on this file; None when nobody does, or it cannot be seen from here.

    Processes outside our PID namespace cannot be seen, nor can locks on some file systems (btrfs) be matched.
    """
    try:
        status = path.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        # proc_locks(5): `1: FLOCK  ADVISORY  WRITE 4711 08:01:131 0 EOF`; `1: -> FLOCK …` only waits.
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == file:  # noqa: PLR2004
            return int(words[4]) if int(words[4]) > 0 else None
    return None


def _lock(path: Path) -> FileLock:
    # A fallback to lock files that mean something by existing would survive a kill -9: rather fail.
    return FileLock(path, mode=0o600, thread_local=False, fallback_to_soft=False)


def _try(lock: FileLock) -> bool:
    """One attempt: a few system calls, nothing that waits."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _is_held(path: Path) -> bool:
    """Look with a shared lock: two that look at once do not take each other for the holder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _described(holder: Holder) -> dict[str, Any]:
    return {
        "pid": holder.pid,
        "url": holder.url,
        "started_at": holder.started_at and holder.started_at.isoformat(),
        "manager_id": holder.manager_id,
    }


def _read_description(path: Path) -> Holder | None:
    try:
        read = json.loads(path.read_bytes())
        return Holder(
            pid=int(read["pid"]),
            url=None if read["url"] is None else str(read["url"]),
            started_at=datetime.fromisoformat(read["started_at"]).astimezone(UTC),
            manager_id=str(read["manager_id"]),
        )
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        return None


def _named(pid: int | None) -> str:
    return "another process" if pid is None else f"process {pid}"
