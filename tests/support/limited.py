"""Keys with limits for a gateway on the test's event loop."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from manager.domain.keys import Grant, Permit, Scope
from tests.support.keyed import as_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.relaying import Front, Reply


class Limited:
    """A gateway that needs keys."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.keyring = front.daemon.backend.keyring
        self.keyring.tell(front.relay.access.use)

    async def make(
        self,
        name: str,
        *scopes: Scope,
        roles: Sequence[str] | None = None,
        models: Sequence[str] | None = None,
        instances: Sequence[str] | None = None,
        **limits: Any,
    ) -> dict[str, str]:
        """Make a key; return the header that presents it."""
        if not self.keyring.has_admin():
            root = Grant("root", frozenset({Scope.ADMIN}), datetime.now(UTC))
            self.root = as_header((await self.keyring.create(root)).secret)
        permit = Permit(
            name,
            roles=None if roles is None else frozenset(roles),
            models=None if models is None else tuple(models),
            instances=None if instances is None else frozenset(instances),
        )
        is_limited = any(one is not None for one in (permit.roles, permit.models, permit.instances))
        grant = Grant(
            name,
            frozenset(scopes or (Scope.CLIENT,)),
            datetime.now(UTC),
            permit=permit if is_limited else None,
            **limits,
        )
        return as_header((await self.keyring.create(grant)).secret)

    def in_flight(self, name: str) -> int:
        """The requests of a key that are counted."""
        quotas = self.front.daemon.backend.passing.routing.quotas
        assert quotas is not None
        return quotas.in_flight(name)

    async def call(self, method: str, path: str, key: dict[str, str] | None = None) -> Reply:
        """One request without a body."""
        caller = await self.front.connect()
        lines = "".join(f"{name}: {value}\r\n" for name, value in (key or self.root).items())
        try:
            host = f"Host: 127.0.0.1:{self.front.port}\r\n"
            await caller.raw(f"{method} {path} HTTP/1.1\r\n{host}{lines}\r\n".encode())
            return await caller.reply()
        finally:
            caller.leave()
