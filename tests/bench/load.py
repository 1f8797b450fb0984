"""`python -m tests.bench.load KIND PORT CONNECTIONS AMOUNT`: a load of one kind, and what it met, as JSON.

`requests`: so many in all, each connection asking anew as soon as it is answered.
$BENCH_KEY, where it is set, is sent with each of them.
`streams`: one on each connection, so many lines each, begun within a second; tells when the first line came.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import cast

import httptools
import uvloop

_MESSAGES = '"messages":[{"role":"user","content":"' + "why is the sky blue? " * 6 + '"}]'


def _request(port: int, body: str) -> bytes:
    key = os.environ.get("BENCH_KEY")
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    return (
        f"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUser-Agent: load\r\nAccept: */*\r\n"
        f"{authorization}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


class _Caller(asyncio.Protocol):
    def __init__(self, request: bytes, amount: list[int], finished: asyncio.Event) -> None:
        self._request = request
        self._amount = amount
        self._finished = finished
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._asked_at = 0.0
        self.latencies: list[float] = []
        self.first_bytes: list[float] = []
        self.lines = 0
        self.bad = 0
        self._is_first = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def ask(self) -> None:
        assert self._transport is not None
        if self._amount[0] <= 0:
            self._transport.close()
            return
        self._amount[0] -= 1
        self._is_first = True
        self._asked_at = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() != 200:
            self.bad += 1

    def on_body(self, body: bytes) -> None:
        if self._is_first:
            self._is_first = False
            self.first_bytes.append(time.perf_counter() - self._asked_at)
        self.lines += body.count(b"\n")

    def on_message_complete(self) -> None:
        self.latencies.append(time.perf_counter() - self._asked_at)
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finished.set()


async def _load(kind: str, port: int, connections: int, amount: int) -> dict[str, object]:
    loop = asyncio.get_running_loop()
    if kind == "requests":
        request, left = _request(port, f'{{"model":"tiny","stream":false,{_MESSAGES}}}'), [amount]
    else:
        options = f'"options":{{"num_predict":{amount}}}'
        request = _request(port, f'{{"model":"tiny","stream":true,{options},{_MESSAGES}}}')
        left = [connections]
    callers = []
    ends = []
    for _ in range(connections):
        ended = asyncio.Event()
        _, caller = await loop.create_connection(
            lambda ended=ended: _Caller(request, left, ended),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        callers.append(caller)
        ends.append(ended)
    began = time.perf_counter()
    pause_s = 1.0 / connections if kind == "streams" else 0.0
    for caller in callers:
        caller.ask()
        if pause_s:
            await asyncio.sleep(pause_s)
    for ended in ends:
        await ended.wait()
    return {
        "took_s": time.perf_counter() - began,
        "latencies": [one for caller in callers for one in caller.latencies],
        "first_bytes": [one for caller in callers for one in caller.first_bytes],
        "lines": sum(caller.lines for caller in callers),
        "bad": sum(caller.bad for caller in callers),
    }


if __name__ == "__main__":
    found = uvloop.run(_load(sys.argv[1], *map(int, sys.argv[2:])))
    json.dump(found, sys.stdout)
