"""Exclusion between tasks and between processes, through filelock; the only file that imports it.

The kernel gives a lock back when its holder dies, however it dies. The files stay: unlinking one would let
two processes hold "the same" lock. They need a local file system that has flock(2), which NFS may not be.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import stat
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from filelock import FileLock, Timeout

from manager.errors import (
    ConfigurationError,
    LockedError,
    ManagerError,
    Reason,
    StateDirHeldError,
    UnavailableError,
)
from manager.settings.ownership import (
    directory_problem,
    make_private_directory,
    open_regular,
    state_file_problem,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_log = structlog.get_logger("locks")

_POLL_S = 0.05
# A command that only looks whether a daemon runs holds the lock for an instant.
_GLANCE_S = 0.25
_LONGEST_DESCRIPTION = 4096
# What is wrong with the disk, not with what the operator wrote.
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE})


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
            make_private_directory(self._directory)
            if problem := directory_problem(self._directory) or state_file_problem(path):
                raise UnavailableError(
                    f"the lock of instance {instance_id} cannot be taken: {problem}",
                    reason=Reason.START_FAILED,
                    instance=instance_id,
                )
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
    """The holder of a state directory, as far as it is known.

    `started_at` is UTC. `config` is the configuration file, empty where the daemon has none, None where it is
    not known. `owner_uid` is the user that the directory, its lock and the description belong to,
    None where they belong to several, or where others may write to the directory: then anybody may have
    written the description.
    """

    pid: int | None = None
    url: str | None = None
    started_at: datetime | None = None
    manager_id: str | None = None
    config: str | None = None
    owner_uid: int | None = field(default=None, compare=False)

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

    def acquire(self, *, within_s: float = 0.0) -> None:
        """Claim the directory, creating it when missing.

        Args:
            within_s: how long to wait for another daemon, which has promised to let go.

        Raises:
            StateDirHeldError: another process holds it; the message says who.
            ConfigurationError: the directory cannot be used, or others could change what is in it.
            ManagerError: the disk is full or broken.
        """
        try:
            # Before anything is created: a parent that others can write to could lead anywhere.
            self._refuse(directory_problem(self._state_dir))
            make_private_directory(self._state_dir)
            self._refuse(directory_problem(self._state_dir) or state_file_problem(self._state_dir / _LOCK))
            deadline = time.monotonic() + _GLANCE_S + within_s
            while not _try(self._lock):
                # A command that looks whether somebody holds it also holds it for a moment, but shared.
                if time.monotonic() >= deadline and _owner_if_held(self._state_dir / _LOCK) is not None:
                    raise self._held()
                time.sleep(_POLL_S)
        except OSError as exc:
            error = ManagerError if exc.errno in _DISK_ERRORS else ConfigurationError
            raise error(
                f"the state directory {self._state_dir} cannot be used: {exc.strerror or exc}"
            ) from exc
        self._holder = replace(self._holder, pid=os.getpid(), started_at=datetime.now(UTC))
        self._publish()

    def describe(self, *, url: str, config: str | None = None) -> None:
        """Publish where this daemon listens, and its configuration file; called while the lock is held."""
        self._holder = replace(self._holder, url=url, config=config)
        self._publish()

    def release(self) -> None:
        """Give the directory back; twice is no error."""
        if self._lock.is_locked:
            with suppress(OSError):
                (self._state_dir / _DESCRIPTION).unlink(missing_ok=True)
            self._lock.release()

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise ConfigurationError(f"the state directory {self._state_dir} cannot be used: {problem}")

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
            new.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(new, flags, 0o600), "w", encoding="utf-8") as stream:  # noqa: PTH123
                stream.write(json.dumps(_described(self._holder)) + "\n")
            new.replace(path)
        except OSError as exc:
            _log.warning("daemon_not_described", path=str(path), error=str(exc))


_LOCK = "daemon.lock"
_DESCRIPTION = "daemon.json"


def read_holder(state_dir: Path) -> Holder | None:
    """Return the holder of the state directory, or None: the description of a dead daemon is ignored.

    Creates and changes nothing.

    Raises:
        ConfigurationError: the directory cannot be read.
    """
    try:
        # A descriptor: lock, description and owner are then of one directory, whatever the path leads to.
        directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _unreadable(state_dir, exc) from exc
    try:
        lock_owner = _owner_if_held(Path(_LOCK), directory)
        if lock_owner is None:
            return None
        found = _read_description(directory)
        status = os.fstat(directory)
    except OSError as exc:
        raise _unreadable(state_dir, exc) from exc
    finally:
        os.close(directory)
    if found is None:
        return Holder(pid=holder_pid(state_dir / _LOCK))
    holder, owner = found
    same = owner == lock_owner == status.st_uid
    private = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return replace(holder, owner_uid=owner if same and private else None)


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


def _owner_if_held(path: Path, directory: int | None = None) -> int | None:
    """The owner of the lock file while the lock is held, else None.

    Looks with a shared lock: two that look at once do not take each other for the holder.
    """
    try:
        descriptor = open_regular(path, follow=False, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
    return None


def _described(holder: Holder) -> dict[str, Any]:
    return {
        "pid": holder.pid,
        "url": holder.url,
        "started_at": holder.started_at and holder.started_at.isoformat(),
        "manager_id": holder.manager_id,
        "config": holder.config,
    }


def _read_description(directory: int) -> tuple[Holder, int] | None:
    """The description of the holder by itself, and the owner of that file; None where there is none."""
    try:
        descriptor = open_regular(Path(_DESCRIPTION), follow=False, dir_fd=directory)
    except OSError as exc:
        if exc.errno == errno.EACCES:
            raise
        return None
    with open(descriptor, "rb") as stream:  # noqa: PTH123
        owner = os.fstat(descriptor).st_uid
        text = stream.read(_LONGEST_DESCRIPTION + 1)
    try:
        read: Any = json.loads(text) if len(text) <= _LONGEST_DESCRIPTION else None
        holder = Holder(
            pid=int(read["pid"]),
            url=None if read["url"] is None else str(read["url"]),
            started_at=datetime.fromisoformat(read["started_at"]).astimezone(UTC),
            manager_id=str(read["manager_id"]),
            config=None if read.get("config") is None else str(read["config"]),
        )
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return holder, owner


def _unreadable(state_dir: Path, exc: OSError) -> ConfigurationError:
    return ConfigurationError(f"the state directory {state_dir} cannot be read: {exc.strerror or exc}")


def _named(pid: int | None) -> str:
    return "another process" if pid is None else f"process {pid}"
