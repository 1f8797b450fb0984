"""Pools of connections, one for each server."""

from __future__ import annotations

import asyncio
from collections import deque
from types import MappingProxyType
from typing import TYPE_CHECKING

from manager.descriptors import lacks_descriptors
from manager.errors import OutOfDescriptorsError
from manager.relay.upstream.address import Address
from manager.relay.upstream.connection import UpstreamConnection

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Mapping

_MOST_IDLE = 1024
_MOST_POOLS = 1024
# Servers close idle connections after 2 s (gunicorn) or 5 s (uvicorn, Node.js, cpp-httplib); a connection is
# given up before that. A new one takes 0.2 ms on the same machine. Behind TLS it takes two round trips and a
# handshake, and proxies that end TLS wait for a minute. See docs/decisions/0011-upstream-connections.md.
_MOST_IDLE_S = 1.5
_MOST_IDLE_TLS_S = 15.0
# So many idle connections make room when descriptors run out.
_MADE_WAY = 8
# Turns of the event loop until the descriptor of an aborted connection is free.
_TURNS_TO_CLOSE = 3


class UpstreamPools:
    """The pools of all servers, at most `_MOST_POOLS`. Lives on the event loop.

    Args:
        tls: returns the TLS context that the process shares.
        own_tls: the same for servers that have their own, by scheme, host and port.
    """

    def __init__(
        self,
        tls: Callable[[], Awaitable[ssl.SSLContext]],
        own_tls: Mapping[str, Callable[[], Awaitable[ssl.SSLContext]]] = MappingProxyType({}),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._own_tls = own_tls
        self._pools: dict[str, UpstreamPool] = {}

    def pool(self, endpoint: str) -> UpstreamPool:
        found = self._pools.get(endpoint)
        if found is None:
            # A container that starts again has a new address; the old one is never used again.
            for old in [name for name, pool in self._pools.items() if pool.is_empty]:
                del self._pools[old]
            if len(self._pools) >= _MOST_POOLS:
                self._pools.pop(next(iter(self._pools))).retire()
            found = self._pools[endpoint] = UpstreamPool(Address.of(endpoint), self._loop, pools=self)
        return found

    async def tls(self, address: Address) -> ssl.SSLContext:
        return await self._own_tls.get(address.origin, self._tls)()

    @property
    def open_connections(self) -> int:
        return sum(pool.open_connections for pool in self._pools.values())

    async def make_way(self) -> None:
        """Close the oldest idle connections to free their descriptors."""
        idle = sorted(
            (connection for pool in self._pools.values() for connection in pool.idle_connections),
            key=lambda connection: connection.idle_since,
        )
        for connection in idle[:_MADE_WAY]:
            connection.abandon()
        for _ in range(_TURNS_TO_CLOSE):
            await asyncio.sleep(0)

    def close_idle(self) -> int:
        """Close all idle connections; return how many."""
        idle = [connection for pool in self._pools.values() for connection in pool.idle_connections]
        for connection in idle:
            connection.abandon()
        return len(idle)

    def close(self) -> None:
        """End every connection."""
        for pool in self._pools.values():
            pool.close()


class UpstreamPool:
    """The connections to one server. The newest idle one is used first, so that the others grow old."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop, *, pools: UpstreamPools) -> None:
        self.address = address
        self._loop = loop
        self._pools = pools
        self._most_idle_s = _MOST_IDLE_TLS_S if address.tls else _MOST_IDLE_S
        self._idle: deque[UpstreamConnection] = deque()
        self._all: set[UpstreamConnection] = set()
        self._connecting = 0
        self._ageing: asyncio.TimerHandle | None = None
        self._retired = False

    def idle(self) -> UpstreamConnection | None:
        """Return an open and free connection, without waiting."""
        oldest = self._loop.time() - self._most_idle_s
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since < oldest:
                connection.abandon()  # the timer is late
            elif connection.usable:
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """Return a new connection.

        Raises:
            OSError: the server cannot be connected to.
            OutOfDescriptorsError: the process lacks descriptors, even after idle connections were closed.
        """
        self._connecting += 1
        try:
            try:
                connection = await self._connected()
            except OSError as error:
                if not lacks_descriptors(error):
                    raise
                await self._pools.make_way()
                connection = await self._connected_at_last()
        finally:
            self._connecting -= 1
        if not connection.usable:
            raise ConnectionResetError("the server closed the connection at once")
        # Not before: uvloop closes a connection whose client is cancelled meanwhile without any callback.
        self._all.add(connection)
        return connection

    @property
    def open_connections(self) -> int:
        return len(self._all)

    @property
    def idle_connections(self) -> tuple[UpstreamConnection, ...]:
        return tuple(self._idle)

    @property
    def is_empty(self) -> bool:
        """Whether no connection is open, and none is being made."""
        return not self._all and not self._connecting

    def retire(self) -> None:
        """Keep no connection from now on; open requests go on."""
        self._retired = True
        for connection in self.idle_connections:
            connection.abandon()

    def close(self) -> None:
        if self._ageing is not None:
            self._ageing.cancel()
        for connection in tuple(self._all):
            connection.abandon()

    # --- what connections call ---

    def kept(self, connection: UpstreamConnection) -> None:
        if self._retired or len(self._idle) >= _MOST_IDLE:
            connection.abandon()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._ageing is None:
            self._ageing = self._loop.call_later(self._most_idle_s, self._close_old)

    def lost(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    # --- helpers ---

    async def _connected(self) -> UpstreamConnection:
        tls = await self._pools.tls(self.address) if self.address.tls else None
        _, connection = await self._loop.create_connection(
            lambda: UpstreamConnection(self), self.address.name, self.address.port, ssl=tls
        )
        return connection

    async def _connected_at_last(self) -> UpstreamConnection:
        try:
            return await self._connected()
        except OSError as error:
            if lacks_descriptors(error):
                raise OutOfDescriptorsError from error
            raise

    def _close_old(self) -> None:
        """Close what a burst of requests has left; the oldest connections are in front."""
        self._ageing = None
        now = self._loop.time()
        while self._idle and now - self._idle[0].idle_since >= self._most_idle_s:
            self._idle.popleft().abandon()
        if self._idle:
            left_s = self._idle[0].idle_since + self._most_idle_s - now
            self._ageing = self._loop.call_later(left_s, self._close_old)
