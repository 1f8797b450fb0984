"""What a request held is released when it ends, without the garbage collector: full collections are rare."""

from __future__ import annotations

import gc
import json
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inside import until
from tests.support.relaying import CHAT, Conversation, Scripted, a_word, relaying

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEGABYTE = b"x" * 2**20
LONG = json.dumps({"model": "tiny", "stream": False, "prompt": MEGABYTE.decode()}).encode()
TIMES = 6


@dataclass(frozen=True)
class Sent:
    """One request; `missing` is how many bytes of its declared length are not sent."""

    path: str
    body: bytes
    missing: int = 0
    lines: str = ""

    @property
    def raw(self) -> bytes:
        lines = self.lines or f"Content-Length: {len(self.body) + self.missing}\r\n"
        return f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode() + self.body


def form(content: bytes, *, missing: int = 0) -> Sent:
    length = len(content) + missing
    lines = f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n"
    return Sent("/v1/audio/transcriptions", content, missing, lines)


CHUNKED = "Transfer-Encoding: chunked\r\n"
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
MODEL = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
BLOB = "/api/blobs/sha256:" + "0" * 64

REQUESTS = {
    "an answered one": Sent(CHAT, LONG),
    "no JSON": Sent(CHAT, LONG[:-1]),
    "no such model": Sent(CHAT, LONG.replace(b"tiny", b"none")),
    "half a body": Sent(CHAT, LONG, missing=1),
    "half a chunk": Sent(CHAT, b"200000\r\n" + MEGABYTE, 1, CHUNKED),
    "a bad chunk": Sent(CHAT, b"100000\r\n" + MEGABYTE + b"zz", lines=CHUNKED),
    "a managed model": Sent("/api/show", LONG),
    "no JSON for a managed model": Sent("/api/show", LONG[:-1]),
    "no such managed model": Sent("/api/show", LONG.replace(b"tiny", b"none")),
    "half a body for a managed model": Sent("/api/show", LONG, missing=1),
    "half a blob": Sent(BLOB, MEGABYTE, missing=1),
    "half a recording before the model": form(FILE + MEGABYTE, missing=1000),
    "half a recording behind the model": form(MODEL + FILE + MEGABYTE, missing=1000),
    "a recording": form(MODEL + FILE + MEGABYTE + b"\r\n--x--\r\n"),
    "a recording before the model": form(FILE + MEGABYTE + b"\r\n" + MODEL + b"--x--\r\n"),
    "a form that is none": form(FILE + MEGABYTE + b"\r\n--xzz"),
}


async def answers(talk: Conversation) -> None:
    if talk.seen.target == CHAT:
        await a_word(talk)
    else:
        await talk.whole(404, b'{"error":"not here"}')


async def breaks(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(b"{")
    talk.crash()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.enable()
        gc.collect()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("server_does", [answers, breaks])
async def test_nothing_large_is_left_to_the_garbage_collector(tmp_path: Path, server_does: Any) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = server_does

        async def once(sent: Sent) -> None:
            caller = await front.connect()
            caller.writer.write(sent.raw)
            if sent.missing:
                await until(lambda: not caller.writer.transport.get_write_buffer_size())
            else:
                await caller.head()
            caller.leave()
            await until(lambda: front.at_rest and not front.server.server_state.connections)
            server.seen.clear()

        kept = {}
        for name, sent in REQUESTS.items():
            await once(sent)
            tracemalloc.start()
            await once(sent)
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(TIMES):
                await once(sent)
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            kept[name] = (after - before) / TIMES / len(sent.raw)
        assert {name: share for name, share in kept.items() if share > 0.3} == {}
