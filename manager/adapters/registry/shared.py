"""The exchange of gateways that share a database, through connections of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select

from manager.adapters.registry import changes, documents, tables
from manager.adapters.registry.dialects import upsert
from manager.adapters.registry.postgres import PostgresDatabase, gateway_lock
from manager.domain.ownership import Owner
from manager.services.ports import KeyUse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

    from manager.adapters.postgres import AdvisoryLocks

_OWNER = "owner"


class SharedDatabase:
    """Implements `services.ports.Shared`.

    Args:
        database: used by nothing else, so that no other call holds up a look; it is closed with this.
        locks: has the session that says that this gateway lives; it is closed with this.
        gateway: the name of this one.
    """

    def __init__(self, database: PostgresDatabase, locks: AdvisoryLocks, gateway: str) -> None:
        self._database = database
        self._locks = locks
        self._gateway = gateway
        self._lock = gateway_lock(gateway)
        self._forgotten_before = ""

    async def hold(self) -> bool:
        return self._lock in self._locks.held or await self._locks.try_exclusive(self._lock)

    async def exchange(
        self, uses: Mapping[str, KeyUse]
    ) -> tuple[Mapping[str, int], Mapping[tuple[str, str], tuple[int, KeyUse]]]:
        table = tables.key_uses
        if uses:
            stored_at = time.time_ns() // 1000
            rows = [
                {"gateway": self._gateway, "key": key, "at_us": stored_at, **use._asdict()}
                for key, use in uses.items()
            ]
            day = min(use.day for use in uses.values())

            def write(connection: Connection) -> None:
                connection.execute(upsert(connection, table), rows)
                if day > self._forgotten_before:
                    connection.execute(delete(table).where(table.c.day < day))

            await self._database.write(write)
            self._forgotten_before = day

        def read(connection: Connection) -> Any:
            others = connection.execute(select(table).where(table.c.gateway != self._gateway))
            found = {
                (row.gateway, row.key): (row.at_us, KeyUse(row.minute, row.day, row.tokens)) for row in others
            }
            return changes.load(connection), found

        numbers, others = await self._database.read(read)
        return numbers, others

    async def owner(self, own: Owner) -> Owner:
        """Return the owner that the gateways share: the one of the gateway that came first."""

        def write(connection: Connection) -> None:
            documents.save_new(connection, _OWNER, _from_owner(own))

        await self._database.write(write)
        return await self._database.read(lambda connection: _to_owner(documents.load(connection, _OWNER)))

    async def save_owner(self, owner: Owner) -> None:
        await self._database.write(lambda connection: documents.save(connection, _OWNER, _from_owner(owner)))

    async def close(self) -> None:
        await self._locks.close()
        await self._database.close()


def _from_owner(owner: Owner) -> dict[str, Any]:
    return {"id": owner.id, "taken_over": sorted(owner.taken_over), "manager_id": owner.manager_id}


def _to_owner(stored: Any) -> Owner:
    return Owner(str(stored["id"]), frozenset(map(str, stored["taken_over"])), stored["manager_id"])
