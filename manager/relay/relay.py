"""State that all requests on the data path share: limits, connections to servers, timers, waits for loads."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog

from manager.relay.loads import LoadWaits
from manager.relay.timers import Timed, Timers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from manager.relay.caller import Caller, KnownHead
    from manager.relay.upstream import UpstreamPools
    from manager.services.bodies import BodyBudget
    from manager.services.open_requests import OpenRequests
    from manager.services.refusals import Refusals
    from manager.services.requests import Requests
    from manager.services.routing.attempting import Attempting, Routing
    from manager.wire.access import Access

_log = structlog.get_logger("relay")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and bytes. `keep_alive_s` 0 sends nothing to a client that waits."""

    connect_timeout_s: float = 5.0
    idle_timeout_s: float = 300.0
    most_body_bytes: int = 256 * 2**20
    keep_alive_s: float = 15.0


class Running(Timed, Protocol):
    """A request under way."""

    @property
    def attempting(self) -> Attempting | None:
        """Its life; None where it has not begun."""

    def cut(self, why: str) -> None:
        """End it now, and tell its client."""

    def cancel(self, why: str) -> None:
        """End it because the operator wants that, and tell its client."""


class Relay:
    """Lives on the event loop. `close` ends every connection to a server."""

    def __init__(
        self,
        routing: Routing,
        *,
        pools: UpstreamPools,
        access: Access,
        limits: Limits,
        bodies: BodyBudget,
        requests: Requests,
        refusals: Refusals,
        unload: Callable[[str, str], Awaitable[str | None]],
        open_requests: OpenRequests | None = None,
    ) -> None:
        self.routing = routing
        self.access = access
        self.limits = limits
        self.bodies = bodies
        self.requests = requests
        self.refusals = refusals
        self.unload = unload
        self.loop = asyncio.get_running_loop()
        self.timers: Timers[Running] = Timers(self.loop)
        if open_requests is not None:
            open_requests.add(lambda: self.exchanges)
        self.loads = LoadWaits()
        self.pools = pools
        # Another daemon takes over: no request begins here any more.
        self.is_leaving = False
        # What was read last of any connection.
        self.latest_caller: Caller | None = None
        self.latest_head: KnownHead | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._all_ended = asyncio.Event()
        self._draining = False

    def close_idle(self) -> int:
        """Close all idle connections to servers; return how many."""
        return self.pools.close_idle()

    @property
    def upstream_connections(self) -> int:
        return self.pools.open_connections

    @property
    def open_tasks(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Go on with one request off the callbacks. What `work` raises is a defect, and is logged."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    # --- who is under way ---

    @property
    def exchanges(self) -> set[Running]:
        return self.timers.timed

    def begun(self, exchange: Running) -> None:
        self.timers.add(exchange)

    def ended(self, exchange: Running) -> None:
        self.timers.discard(exchange)
        if self._draining and not self.exchanges:
            self._all_ended.set()

    async def drain(self, timeout_s: float, *, cut: asyncio.Event) -> None:
        """Let what is under way come to its end, for so long or until `cut` is set; then cut it."""
        if self.exchanges:
            self._draining = True
            waits = [asyncio.ensure_future(event.wait()) for event in (self._all_ended, cut)]
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            for exchange in tuple(self.exchanges):
                exchange.cut("the manager is being stopped")

    async def close(self) -> None:
        self.timers.close()
        for exchange in tuple(self.exchanges):
            exchange.cut("the manager has been stopped")  # it came while the others were let end
        self.pools.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("request_failed", exc_info=error)
