"""The processes on the cards: whose they are, and what they are called."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.domain.gpu import Gpu
    from manager.services.ports import ContainerPids


@dataclass(frozen=True, slots=True)
class _Identity:
    container: str | None
    name: str | None


class Processes:
    """Owns which container each process on a card belongs to, and which instance each container is of.

    Identities are read when the cards are, in a thread, and kept while their process is on a card. They are
    bounded by the processes that NVML lists, the containers by those of the instances.

    Attributes:
        version: grows whenever a process may have got another name or instance.
    """

    def __init__(self, pids: ContainerPids) -> None:
        self._pids = pids
        self._instances: dict[str, str] = {}
        self._first_pids: dict[str, int] = {}
        self._identities: Mapping[int, _Identity] = {}
        self._lists_any = False
        self._is_host = False
        self.version = 0

    def note_container(self, container_id: str, instance: str, pid: int | None = None) -> None:
        """Remember the instance of a container; `pid` is its first process as its engine numbers it."""
        if self._instances.get(container_id) != instance:
            self.version += 1
        self._instances[container_id] = instance
        if pid:
            self._first_pids[container_id] = pid

    def forget_container(self, container_id: str) -> None:
        if self._instances.pop(container_id, None) is not None:
            self.version += 1
        self._first_pids.pop(container_id, None)

    def has_container(self, instance: str) -> bool:
        return instance in self._instances.values()

    @property
    def are_visible(self) -> bool:
        """Whether a process of a container that holds memory would be seen.

        The driver must have listed a process: some list none, ever, and call that a success. The numbers of
        processes must be those of the daemon's pid namespace, which a container of an instance proves.
        """
        return self._lists_any and self._is_host

    def instance_of(self, pid: int) -> str | None:
        identity = self._identities.get(pid)
        if identity is None or identity.container is None:
            return None
        return self._instances.get(identity.container)

    def name_of(self, pid: int) -> str | None:
        identity = self._identities.get(pid)
        return identity.name if identity else None

    async def identify(self, gpus: Iterable[Gpu]) -> None:
        """Read the identity of each process on the cards, unless it is known."""
        pids = {process.pid for gpu in gpus for process in gpu.processes}
        kept = {
            pid: identity
            for pid, identity in self._identities.items()
            if pid in pids and identity.container is not None and identity.name is not None
        }
        new = pids - kept.keys()
        self._lists_any = self._lists_any or bool(pids)
        unproven = {} if self._is_host else dict(self._first_pids)
        if new or unproven:
            read, proven = await asyncio.to_thread(self._read, new, unproven)
            kept |= read
            self._is_host = self._is_host or proven
        if kept != self._identities:
            self.version += 1
        self._identities = kept
        self._is_host = self._is_host or any(self.instance_of(pid) for pid in pids)

    def _read(self, pids: Iterable[int], first_pids: Mapping[str, int]) -> tuple[dict[int, _Identity], bool]:
        read = {pid: _Identity(self._pids.container_of(pid), self._pids.name_of(pid)) for pid in pids}
        return read, any(self._pids.container_of(pid) == id_ for id_, pid in first_pids.items())
