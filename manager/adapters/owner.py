"""The owner of a state directory, and the claim of one daemon to a manager id on an engine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import struct
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from manager.domain.ownership import Owner
from manager.errors import ManagerError, ManagerIdHeldError
from manager.settings.ownership import open_regular

if TYPE_CHECKING:
    from pathlib import Path

_log = structlog.get_logger("daemon")

_FILE = "owner.json"
_LONGEST = 16 * 1024
# Lost state directories are remembered by their owner ids; older ones have no containers left.
_MOST_TAKEN_OVER = 16
# A command that holds the id for a moment accepts nobody: each question takes one place of the backlog.
_MOST_QUESTIONS = 4096
_TRIES = 3
_ANSWER_S = 1.0
_SO_PEERCRED = getattr(socket, "SO_PEERCRED", None)


def known_owner(state_dir: Path) -> Owner | None:
    """Return the owner of a state directory as far as it can be read; nothing is created."""
    if not (state_dir / _FILE).exists():
        return None
    try:
        return read_owner(state_dir)
    except ManagerError:
        return None


def read_owner(state_dir: Path) -> Owner:
    """The owner of a state directory, which is created with the first call.

    Raises:
        ManagerError: the file is no owner's, or cannot be read or written.
    """
    path = state_dir / _FILE
    try:
        descriptor = open_regular(path, follow=False)
    except FileNotFoundError:
        owner = Owner(secrets.token_hex(8))
        _write(path, owner)
        return owner
    except OSError as error:
        raise ManagerError(f"{path} cannot be read: {error.strerror or error}") from error
    with open(descriptor, "rb") as stream:  # noqa: PTH123
        text = stream.read(_LONGEST)
    try:
        read: Any = json.loads(text)
        owner = Owner(str(read["id"]), frozenset(map(str, read["taken_over"])))
        former = read.get("manager_id")  # older versions do not write it
        return owner if former is None else replace(owner, manager_id=str(former))
    except (ValueError, TypeError, LookupError) as error:
        raise ManagerError(
            f"{path} is damaged; restore it from a backup, or remove it and take the containers over with "
            "`ollama-manager serve --take-over`"
        ) from error


def take_over(state_dir: Path, owner: Owner, ids: frozenset[str]) -> Owner:
    """Store that the containers of other owners belong to this state directory from now on.

    Raises:
        ManagerError: it could not be stored; nothing was taken over.
    """
    known = sorted(owner.taken_over - ids)[: max(0, _MOST_TAKEN_OVER - len(ids))]
    wider = replace(owner, taken_over=ids | frozenset(known))
    _write(state_dir / _FILE, wider)
    return wider


def keep_manager_id(state_dir: Path, owner: Owner, manager_id: str) -> Owner:
    """Store the manager id that the containers of this state directory have from now on.

    Raises:
        ManagerError: it could not be stored.
    """
    if owner.manager_id == manager_id:
        return owner
    renamed = replace(owner, manager_id=manager_id)
    _write(state_dir / _FILE, renamed)
    return renamed


def keep_owner(state_dir: Path, owner: Owner) -> Owner:
    """Store an owner in place of that of the state directory.

    Raises:
        ManagerError: it could not be stored.
    """
    _write(state_dir / _FILE, owner)
    return owner


def _write(path: Path, owner: Owner) -> None:
    new = path.with_suffix(".json.new")
    values = {"id": owner.id, "taken_over": sorted(owner.taken_over), "manager_id": owner.manager_id}
    content = json.dumps(values) + "\n"
    try:
        new.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600), "w", encoding="utf-8") as stream:  # noqa: PTH123
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        new.replace(path)
    except OSError as error:
        raise ManagerError(f"{path} cannot be written: {error.strerror or error}") from error


class ManagerIdLock:
    """The claim of one daemon to a manager id on an engine, among the daemons of this machine.

    It is an abstract Unix socket (unix(7)): the kernel frees the name with the process, however that ends,
    and no file can be lost or left behind. A daemon that is to replace this one asks there
    (`manager.handover`). Daemons in other network namespaces are not seen; they are told
    apart by the owner label of their containers.

    Args:
        manager_id: the id.
        engine_url: of the engine.
        state_dir: of this daemon, where several may serve the id because they share a database: each has a
            claim of its own. None: one may.
    """

    def __init__(self, manager_id: str, engine_url: str, state_dir: Path | None = None) -> None:
        self._manager_id = manager_id
        path = engine_url.removeprefix("unix://")
        engine = os.path.realpath(path) if path != engine_url else engine_url
        directory = "" if state_dir is None else f"\0{os.path.realpath(state_dir)}"
        digest = hashlib.sha256(f"{engine}\0{manager_id}{directory}".encode()).hexdigest()[:32]
        self._address = f"\0ollama-manager/{digest}"
        self._socket: socket.socket | None = None

    def acquire(self) -> None:
        """Claim the id; does not wait.

        Raises:
            ManagerIdHeldError: another daemon of this user or of root has it.
        """
        for _ in range(_TRIES):
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                claim.bind(self._address)
                claim.listen(_MOST_QUESTIONS)
            except OSError as error:
                claim.close()
                if error.errno != errno.EADDRINUSE:
                    return  # a system without abstract sockets: the labels have to do
            else:
                self._socket = claim
                return
            holder = self.holder()
            if holder is None:
                continue  # it has ended just now
            pid, uid = holder
            if uid not in (0, os.geteuid()):
                # Anybody can take a name: a stranger must not keep the daemon from starting.
                _log.warning("manager_id_claimed_by_another_user", manager_id=self._manager_id, uid=uid)
                return
            which = f", process {pid}," if pid else ""
            raise ManagerIdHeldError(
                f"another daemon{which} serves manager_id {self._manager_id!r} on this engine "
                "with another state directory"
            )

    @property
    def claim(self) -> socket.socket | None:
        """The listening socket while the id is held; None on a system without abstract sockets."""
        return self._socket

    def connect(self) -> socket.socket | None:
        """Return a connection to the daemon of this user or of root that has the id; None where none has."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.settimeout(_ANSWER_S)
        try:
            channel.connect(self._address)
            if is_same_user(channel):
                return channel
        except OSError:
            pass
        channel.close()
        return None

    def release(self) -> None:
        """Give the id back; twice is no error."""
        claim, self._socket = self._socket, None
        if claim is not None:
            claim.close()

    def holder(self) -> tuple[int, int] | None:
        """Return the process and the user that hold the id; None where it is free.

        The process is 0 where the kernel does not tell. Claims nothing.
        """
        if _SO_PEERCRED is None:
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as question:
            question.settimeout(_ANSWER_S)
            with suppress(TimeoutError, BlockingIOError):  # a full backlog: it is held, and says no more
                try:
                    question.connect(self._address)
                except ConnectionRefusedError:
                    return None
                return _process_and_user(question)
        return 0, os.geteuid()


def is_same_user(peer: socket.socket) -> bool:
    """Whether the other end of a Unix socket is a process of this user or of root."""
    return _SO_PEERCRED is not None and _process_and_user(peer)[1] in (0, os.geteuid())


def _process_and_user(peer: socket.socket) -> tuple[int, int]:
    assert _SO_PEERCRED is not None  # noqa: S101  (looked at before)
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, _SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid
