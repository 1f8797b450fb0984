"""What all requests on the data path share: limits, connections to servers, timers, who waits for what."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from manager.relay.timers import Timers
from manager.services.traffic import never

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from manager.relay.exchange import Exchange
    from manager.relay.upstream import UpstreamPool, UpstreamPools
    from manager.services.gateway import Gateway
    from manager.wire.access import Access
    from manager.wire.caller import HeaderNames

_log = structlog.get_logger("relay")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and bytes. `keep_alive_s` 0 means that a caller who waits hears nothing meanwhile."""

    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    total_timeout_s: float = 3600.0
    most_body_bytes: int = 256 * 2**20
    keep_alive_s: float = 15.0


class Relay:
    """Lives on the event loop. `close` ends every connection to a server."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        pools: UpstreamPools,
        access: Access,
        limits: Limits,
        headers: HeaderNames,
        default_project: str,
        samples: Callable[[str], bool] = never,
    ) -> None:
        self.gateway = gateway
        self.access = access
        self.limits = limits
        self.headers = headers
        self.default_project = default_project
        self.samples = samples
        self.loop = asyncio.get_running_loop()
        self.timers: Timers[Exchange] = Timers(self.loop)
        self._loading: defaultdict[tuple[str, str], set[Exchange]] = defaultdict(set)
        self.pools = pools
        self._tasks: set[asyncio.Task[None]] = set()
        self._all_ended = asyncio.Event()
        self._draining = False
        # Random to tell one daemon from another, and a counter behind it: an id for the price of an addition.
        self.id_prefix = os.urandom(6).hex()
        self.span_prefix = os.urandom(4).hex()
        self._numbers = itertools.count(1)
        gateway.under_way = self._models_at_work

    def pool(self, endpoint: str) -> UpstreamPool:
        return self.pools.pool(endpoint)

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

    def next_number(self) -> int:
        """What makes the ids of a request its own."""
        return next(self._numbers)

    def wall_clock(self) -> datetime:
        return datetime.now(UTC)

    # --- who is under way ---

    @property
    def exchanges(self) -> set[Exchange]:
        return self.timers.timed

    def begun(self, exchange: Exchange) -> None:
        self.timers.add(exchange)

    def ended(self, exchange: Exchange) -> None:
        self.timers.discard(exchange)
        if self._draining and not self.exchanges:
            self._all_ended.set()

    def waits_for_load(self, exchange: Exchange, instance: str, model: str) -> None:
        self._loading[instance, model].add(exchange)

    def waits_no_more(self, exchange: Exchange, instance: str, model: str) -> None:
        waiting = self._loading.get((instance, model))
        if waiting is None:
            return
        waiting.discard(exchange)
        if all(other.is_left for other in waiting):
            # Only those whose callers have gone are left: nobody needs what they would bring.
            self._loading.pop((instance, model), None)
            for other in waiting:
                other.give_up()

    def others_wait(self, exchange: Exchange, instance: str, model: str) -> bool:
        """Whether somebody else who is still there waits for the same model to be loaded."""
        waiting = self._loading.get((instance, model), ())
        return any(other is not exchange and not other.is_left for other in waiting)

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

    def _models_at_work(self) -> list[tuple[str, bool]]:
        return [at_work for exchange in self.exchanges if (at_work := exchange.model_at_work) is not None]

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("request_failed", exc_info=error)
