"""A daemon in front of servers on the test's event loop, whose answers end when the test says so."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from tests.support.gateway import NO_ENGINE, Gateway
from tests.support.relaying import LAST, LINE, Conversation, Scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path


class Gated(Scripted):
    """A server whose answers stream a word and wait for `open`, for `takes_s` at most.

    `most` is how many it had at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Semaphore(0)
        self.at_once = 0
        self.most = 0
        self.takes_s: float | None = None
        self.answer = self.wait

    async def wait(self, talk: Conversation) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        opened, left = asyncio.ensure_future(self.open.acquire()), asyncio.ensure_future(talk.left())
        try:
            await talk.begin()
            await talk.chunk(LINE)
            waits = {opened, left}
            await asyncio.wait(waits, timeout=self.takes_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.at_once -= 1
            opened.cancel()
            left.cancel()
            await asyncio.wait({opened, left})
        await talk.chunk(LAST)
        await talk.end()


@asynccontextmanager
async def gateway_before(
    home: Path, servers: Mapping[str, Scripted], *, slots: int, **config: Any
) -> AsyncIterator[Gateway]:
    """A daemon in a process of its own; its methods are for `asyncio.to_thread`, which has threads enough."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
    instances = {
        id_: {"driver": "external", "url": server.url, "slots": slots} for id_, server in servers.items()
    }
    written = {
        "gpus": "none",
        "lifecycle": {"probe_interval_s": 0.5, "resync_interval_s": 1},
        "instances": instances,
        **config,
    }
    daemon = Gateway(home, written, engine_url=NO_ENGINE)
    daemon.servers = {}
    with daemon:
        daemon.start(until_ready=False)
        await asyncio.to_thread(daemon.wait_until_alive)
        await asyncio.to_thread(daemon.wait_until_usable, *servers)
        yield daemon
