"""`python -m tests.bench.responder PORT BYTES` answers each request with so many bytes, at once.

It is measured beside the daemon: on a busy machine its latency is what any server would have.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop


class _Responder(asyncio.Protocol):
    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        if self._transport is not None and data.endswith(b"\r\n\r\n"):
            self._transport.write(self._answer)


async def _serve(port: int, size: int) -> None:
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode() + b" " * size
    server = await asyncio.get_running_loop().create_server(lambda: _Responder(answer), "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(*map(int, sys.argv[1:])))
