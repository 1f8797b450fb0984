"""`python -m tests.bench.clients`: the processor time of a request, beside aiohttp and httpx.

The server is a process of its own: the time is that of the client alone. All clients run on uvloop, in
turn, several times; the least time counts, since a busy machine only adds to it.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, cast

import aiohttp
import httpx
import uvloop

from manager.adapters.http_client import HttpClient
from manager.adapters.tls import SharedTls
from manager.relay.model_server import PooledModelServer
from manager.relay.upstream import UpstreamPools
from manager.services.ports import Question

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from manager.relay.upstream import AnswerHead, UpstreamPool

    Ask = Callable[[], Awaitable[None]]

_ANSWER_BYTES = 1000
_REQUESTS = 1500
_ROUNDS = 5
_END = b"the end"
_BODY = b"x" * 193 + _END
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _ANSWER_BYTES + bytes(_ANSWER_BYTES)


class _Responder(asyncio.Protocol):
    """Answers each request once it is whole, whether head and body arrive together or not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        if data.endswith(_END) or (data.startswith(b"GET ") and data.endswith(b"\r\n\r\n")):
            self._transport.write(_ANSWER)


async def _serve(descriptor: int) -> None:
    listener = socket.socket(fileno=descriptor)
    server = await asyncio.get_running_loop().create_server(_Responder, sock=listener)
    await server.serve_forever()


class _Sink:
    def __init__(self, pool: UpstreamPool, head: bytes) -> None:
        self._pool = pool
        self._head = head
        self._done: asyncio.Future[None] | None = None

    async def ask(self) -> None:
        self._done = asyncio.get_running_loop().create_future()
        connection = self._pool.idle() or await self._pool.connect()
        connection.send(self, self._head, (_BODY,))
        await self._done

    def head_came(self, head: AnswerHead) -> None:
        pass

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        if complete and self._done is not None:
            self._done.set_result(None)

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        raise AssertionError(why)


async def _clients(url: str, stack: AsyncExitStack) -> dict[str, Ask]:
    tls = SharedTls().context
    pools = UpstreamPools(tls)
    stack.callback(pools.close)
    client = HttpClient(url, most_bytes=2**20, tls=tls)
    stack.callback(client.close)
    session = await stack.enter_async_context(aiohttp.ClientSession())
    once = await stack.enter_async_context(
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
    )
    other = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
    server = PooledModelServer(pools, connect_timeout_s=5, patience_s=60)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(_BODY)
    relayed = _Sink(pools.pool(url), head)

    async def get() -> None:
        await client.ask("GET", "/api/version")

    async def aiohttp_get() -> None:
        async with session.get(f"{url}/api/version") as answer:
            await answer.read()

    async def httpx_get() -> None:
        await other.get(f"{url}/api/version")

    async def aiohttp_post() -> None:
        async with session.post(url, data=_BODY) as answer:
            await answer.read()

    async def httpx_post() -> None:
        await other.post(url, content=_BODY)

    async def whole() -> None:
        async with server.ask(Question("a", url, "POST", "/", (), _BODY)) as answer:
            while await answer.piece():
                pass

    async def aiohttp_once() -> None:
        async with once.post(url, data=_BODY) as answer:
            await answer.read()

    return {
        "short request, kept: adapters.http_client": get,
        "short request, kept: aiohttp": aiohttp_get,
        "short request, kept: httpx": httpx_get,
        "inference, kept: relay.upstream": relayed.ask,
        "inference, kept: aiohttp": aiohttp_post,
        "inference, kept: httpx": httpx_post,
        "whole, new connection: relay.model_server": whole,
        "whole, new connection: aiohttp": aiohttp_once,
    }


async def _measure(port: int) -> None:
    least: dict[str, tuple[float, float]] = {}
    async with AsyncExitStack() as stack:
        clients = await _clients(f"http://127.0.0.1:{port}", stack)
        for _ in range(_ROUNDS):
            for name, ask in clients.items():
                await ask()
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(_REQUESTS):
                    await ask()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                before = least.get(name, (cpu, wall))
                least[name] = min(cpu, before[0]), min(wall, before[1])
    print(f"{'':45}  CPU µs  wall µs")
    for name, (cpu, wall) in least.items():
        print(f"{name:45} {cpu / _REQUESTS * 1e6:7.0f} {wall / _REQUESTS * 1e6:8.0f}")


def main() -> None:
    if sys.argv[1:]:
        uvloop.run(_serve(int(sys.argv[1])))
        return
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        descriptor = listener.fileno()
        command = [sys.executable, "-m", "tests.bench.clients", str(descriptor)]
        with subprocess.Popen(command, pass_fds=[descriptor]) as responder:
            try:
                uvloop.run(_measure(listener.getsockname()[1]))
            finally:
                responder.terminate()


if __name__ == "__main__":
    main()
