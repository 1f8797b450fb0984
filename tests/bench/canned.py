"""`python -m tests.bench.canned PORT…`: as much of an Ollama as a relay needs, as fast as Python can be.

Answers to `/api/chat` are canned: about 1 KB at once, or with `"stream":true` a line every 20 ms, as many as
`num_predict` says. What is measured in front of it pays for nothing but the relaying.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import httptools
import uvloop

_LINE = (
    b'{"model":"tiny:latest","created_at":"2026-01-01T00:00:00.000000Z","message":'
    b'{"role":"assistant","content":" word"},"done":false}\n'
)
_LAST = (
    b'{"model":"tiny:latest","created_at":"2026-01-01T00:00:00.000000Z","message":'
    b'{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":1,'
    b'"load_duration":1,"prompt_eval_count":12,"prompt_eval_duration":1,"eval_count":34,"eval_duration":1}\n'
)
_WHOLE = (
    b'{"model":"tiny:latest","created_at":"2026-01-01T00:00:00.000000Z","message":{"role":"assistant",'
    b'"content":"' + b"word " * 160 + b'"},"done":true,"done_reason":"stop","total_duration":1,'
    b'"load_duration":1,"prompt_eval_count":12,"prompt_eval_duration":1,"eval_count":34,"eval_duration":1}'
)
_TAGS = (
    b'{"models":[{"name":"tiny:latest","model":"tiny:latest","modified_at":"2026-01-01T00:00:00Z","size":1,'
    b'"digest":"0","details":{}}]}'
)
_PS = (
    b'{"models":[{"name":"tiny:latest","model":"tiny:latest","size":1,"digest":"0","details":{},'
    b'"expires_at":"2318-01-01T00:00:00Z","size_vram":0}]}'
)
_EVERY_S = 0.02


def _document(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(content),
        content,
    )


_ANSWERS = {
    b"/api/version": _document(b'{"version":"0.24.0"}'),
    b"/api/tags": _document(_TAGS),
    b"/api/ps": _document(_PS),
    b"/api/chat": _document(_WHOLE),
}
_NOT_FOUND = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINES = re.compile(rb'"num_predict":\s*(\d+)')


ON_CARD = _ANSWERS | {b"/api/ps": _document(_PS.replace(b'"size_vram":0', b'"size_vram":1'))}
"""The answers of a server whose model is in the memory of a card."""


class CannedServer(asyncio.Protocol):
    answers = _ANSWERS

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._url = b""
        self._transport: asyncio.Transport | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url
        self._body = b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        assert self._transport is not None
        if b'"stream":true' not in self._body.replace(b" ", b""):
            self._transport.write(self.answers.get(self._url, _NOT_FOUND))
            return
        match = _LINES.search(self._body)
        self._left = int(match[1]) if match else 10
        self._transport.write(_STREAM_HEAD)
        self._next_line()

    def _next_line(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._left -= 1
        if self._left > 0:
            self._transport.write(b"%x\r\n%b\r\n" % (len(_LINE), _LINE))
            asyncio.get_running_loop().call_later(_EVERY_S, self._next_line)
        else:
            self._transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(_LAST), _LAST))


async def _serve(ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(CannedServer, "127.0.0.1", port, backlog=2048) for port in ports]
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    uvloop.run(_serve([int(port) for port in sys.argv[1:]]))
