"""The row of one instance in the registry."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.instance import InstanceSpec
    from manager.domain.registry import InstanceRow, PinAndTtl
    from manager.services.world import World


class Store:
    """Owns the row of one instance.

    Args:
        world: the collaborators of all instances.
        spec: the configured side of the instance.
        row: the row as an earlier run has stored it.
        current: returns the row with target, operation, last use and counters as they are.

    Attributes:
        spec: the configured side; may be replaced.
        row: overrides, number of starts and port of the instance.
        is_dormant: nothing is stored: the row is for another daemon.
    """

    def __init__(
        self,
        world: World,
        spec: InstanceSpec,
        row: InstanceRow,
        current: Callable[[InstanceRow], InstanceRow],
    ) -> None:
        self._world = world
        self.spec = spec
        self._current = current
        self._stored: InstanceRow | None = None
        self.row = row
        self.is_dormant = False
        self._turn = asyncio.Lock()

    @property
    def ttl_s(self) -> float:
        return self.spec.limits.ttl_s if self.row.ttl_s is None else self.row.ttl_s

    @property
    def pinned(self) -> bool:
        return self.spec.pinned if self.row.pinned is None else self.row.pinned

    def count_start(self) -> None:
        self.row = replace(self.row, starts=self.row.starts + 1)

    def note_recreation(self) -> None:
        self.row = replace(self.row, recreated_at=self._world.utcnow())

    @property
    def overrides(self) -> PinAndTtl:
        return {"pinned": self.row.pinned, "ttl_s": self.row.ttl_s}

    async def override(self, overrides: PinAndTtl) -> None:
        """Override TTL or pin; None takes an override back.

        Raises:
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        async with self._turn:
            if not self.is_dormant:
                await self._world.registry.save_pin_and_ttl(self.spec.id, overrides)
            self.follow(overrides)

    def follow(self, overrides: PinAndTtl) -> None:
        """Override TTL or pin as it is stored already."""
        self.row = replace(self.row, **overrides)

    async def save(self) -> None:
        """Store the row, if it differs from the stored one.

        Raises:
            RegistryUnwritableError: it could not be stored.
        """
        async with self._turn:  # a row from before an override is not to be stored after it
            if self.is_dormant:
                return
            row = self._current(self.row)
            if row != self._stored:
                await self._world.registry.save_instance(row)
                self._stored = row

    async def save_quietly(self) -> None:
        """As `save`, but record a failure: the next daemon finds out by itself what came of an operation."""
        try:
            await self.save()
        except RegistryUnwritableError as error:
            self._world.journal.record("state_not_stored", instance=self.spec.id, detail=error.message)
