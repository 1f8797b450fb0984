"""Instances that several gateways use: none of them ends what another one uses."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Literal, Protocol

from manager.errors import LockedError, ManagerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.services.ports import InstanceLocks

_POLL_S = 0.1
# How soon shares are taken again once the database is back.
_RETAKE_S = 0.5
# A gateway whose connection was cut has lost its shares at once. It takes them again well within this time.
_SETTLED_S = 3.0


class SessionLocks(Protocol):
    """Locks of one session of a database; they are gone when its connection is lost.

    Raises:
        ManagerError: the database is away.
    """

    @property
    def held(self) -> frozenset[str]: ...
    async def try_exclusive(self, name: str) -> bool: ...
    async def try_shared(self, name: str) -> bool: ...
    async def release(self, name: str, *, shared: bool = False) -> bool: ...


class Sharing:
    """Owns this gateway's shares of instances, and its locks of those that it starts and stops.

    A gateway has a share of an instance from when it is ready until it is idle here. One that wants to end
    the instance gives its own share up and takes the lock alone: that works where no other one has a share.
    A share that was seen and is gone may be of a connection that was cut: there is time to take it again.
    While the database is away no instance is ended for being idle, and none is started.

    Args:
        locks: of the database.
        manager_id: of the instances.
        beneath: the locks between the processes of this machine.
        wait_s: how long another gateway is waited for.
    """

    def __init__(
        self, locks: SessionLocks, manager_id: str, *, beneath: InstanceLocks, wait_s: float
    ) -> None:
        self._locks = locks
        self._prefix = manager_id
        self._beneath = beneath
        self._wait_s = wait_s
        # By instance: the lock of the session, as far as the connection still lives.
        self._modes: dict[str, Literal["shared", "alone"]] = {}
        self._used: set[str] = set()
        self._over: set[str] = set()
        self._turns: dict[str, asyncio.Lock] = {}
        # Instances that others had a share of, and since when they have none; None: they had one last.
        self._left_at: dict[str, float | None] = {}
        self._news = asyncio.Event()

    @asynccontextmanager
    async def hold(self, instance_id: str) -> AsyncIterator[None]:
        """Hold an instance, as `InstanceLocks`: against other gateways too.

        Raises:
            LockedError: another gateway held it for longer than `wait_s`.
            ManagerError: the database is away.
        """
        name = f"operation {self._prefix} {instance_id}"
        async with self._beneath.hold(instance_id):
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self._wait_s
            while not await self._locks.try_exclusive(name):
                if loop.time() >= deadline:
                    raise LockedError(
                        f"another gateway starts or stops {instance_id} for longer than {self._wait_s:g} s",
                        instance=instance_id,
                        retry_after_s=self._wait_s,
                    )
                await asyncio.sleep(_POLL_S)
            try:
                yield
            finally:
                with suppress(ManagerError):  # a lost connection has given it back
                    await self._locks.release(name)

    async def take(self, instance_id: str) -> None:
        """Take a share: this gateway uses the instance. Waits while another one ends it.

        Raises:
            LockedError: another gateway has ended it for longer than `wait_s`.
            ManagerError: the database is away.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait_s
        while True:
            async with self._turn(instance_id):
                self._over.discard(instance_id)
                if await self._shared(instance_id):
                    self._used.add(instance_id)
                    return
            if loop.time() >= deadline:
                why = f"another gateway stops {instance_id} for longer than {self._wait_s:g} s"
                raise LockedError(why, instance=instance_id, retry_after_s=self._wait_s)
            await asyncio.sleep(_POLL_S)

    async def alone(self, instance_id: str) -> bool:
        """Give the own share up; return whether no other gateway has one. None can take one until `over`.

        Raises:
            ManagerError: the database is away; the share is taken again when it is back.
        """
        async with self._turn(instance_id):
            self._over.discard(instance_id)
            if self._mode(instance_id) == "alone":
                return True
            try:
                await self._release(instance_id)
                taken = await self._locks.try_exclusive(self._name(instance_id))
                if taken and not self._have_left(instance_id):
                    await self._locks.release(self._name(instance_id))
                    taken = False
                elif not taken:
                    self._left_at[instance_id] = None
            except ManagerError:
                self._used.add(instance_id)
                raise
            self._used.discard(instance_id)
            if taken:
                self._modes[instance_id] = "alone"
            return taken

    def over(self, instance_id: str) -> None:
        """Give everything of an instance back: its server is gone. Waits for nothing."""
        self._used.discard(instance_id)
        self._over.add(instance_id)
        self._news.set()

    async def run(self) -> None:
        """Give back what is over, and take shares again that were lost with the connection."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_RETAKE_S):
                    await self._news.wait()
            self._news.clear()
            with suppress(ManagerError):
                await self._settle()

    # --- helpers ---

    def _have_left(self, instance_id: str) -> bool:
        """Return whether the others, which have no share now, had none for long enough."""
        if instance_id not in self._left_at:
            return True
        now = asyncio.get_running_loop().time()
        left_at = self._left_at[instance_id]
        if left_at is None:
            left_at = self._left_at[instance_id] = now
        if now - left_at < _SETTLED_S:
            return False
        del self._left_at[instance_id]
        return True

    async def _settle(self) -> None:
        for instance_id in [*self._over]:
            async with self._turn(instance_id):
                if instance_id in self._over:
                    await self._release(instance_id)
                    self._over.discard(instance_id)
        for instance_id in [one for one in self._used if self._mode(one) is None]:
            async with self._turn(instance_id):
                if instance_id in self._used:
                    await self._shared(instance_id)

    async def _shared(self, instance_id: str) -> bool:
        mode = self._mode(instance_id)
        if mode == "alone":
            await self._release(instance_id)
        if mode == "shared":
            return True
        taken = await self._locks.try_shared(self._name(instance_id))
        if taken:
            self._modes[instance_id] = "shared"
        return taken

    async def _release(self, instance_id: str) -> None:
        mode = self._mode(instance_id)
        if mode is not None:
            del self._modes[instance_id]
            await self._locks.release(self._name(instance_id), shared=mode == "shared")

    def _mode(self, instance_id: str) -> Literal["shared", "alone"] | None:
        """Return how the session has an instance; None where it has it not, or has lost it."""
        if instance_id in self._modes and self._name(instance_id) not in self._locks.held:
            del self._modes[instance_id]
        return self._modes.get(instance_id)

    def _turn(self, instance_id: str) -> asyncio.Lock:
        return self._turns.setdefault(instance_id, asyncio.Lock())

    def _name(self, instance_id: str) -> str:
        return f"use {self._prefix} {instance_id}"


class NoSharing:
    """Stands for `Sharing` where this gateway is the only one."""

    async def take(self, instance_id: str) -> None:
        """Do nothing."""

    async def alone(self, instance_id: str) -> bool:  # noqa: ARG002
        """Return True: there is no other gateway."""
        return True

    def over(self, instance_id: str) -> None:
        """Do nothing."""
