"""A server with models that can be changed, which does with each request what the test says."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from tests.support.relaying import Conversation, Reply, Scripted, Seen

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from tests.support.relaying import Caller, Front


class Store(Scripted):
    """Answers requests about models at once, unless `on` has something else for their path.

    Bodies below the paths in `unread`, of blobs at first, are left unread: what is done with them is up to
    the test.
    """

    def __init__(self, models: tuple[str, ...] = ("tiny",)) -> None:
        super().__init__(models)
        self.unread = ("/api/blobs/",)
        self.on: dict[str, Callable[[Conversation], Awaitable[None]]] = {}
        self.answer = self._manage

    def asked(self, path: str) -> list[Any]:
        """The bodies of requests to a path so far."""
        return [seen.json() if seen.body else None for seen in self.seen if seen.target == path]

    def add(self, model: str) -> None:
        self.models = (*self.models, model)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Store]:
        async with super().serving():
            yield self

    async def _manage(self, talk: Conversation) -> None:
        target = talk.seen.target.partition("?")[0]
        path = "/api/blobs" if target.startswith("/api/blobs/") else target
        if path in self.on:
            await self.on[path](talk)
            return
        match path:
            case "/api/show":
                await talk.whole(200, b'{"details":{}}')
            case "/api/delete":
                self.models = tuple(name for name in self.models if name != talk.seen.json()["model"])
                await talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            case "/api/copy":
                self.add(talk.seen.json()["destination"])
                await talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            case "/api/pull" | "/api/create" | "/api/push":
                await talk.begin()
                await talk.chunk(line("working"))
                self.add(talk.seen.json()["model"])
                await talk.chunk(line("success"))
                await talk.end()
            case _:
                await talk.whole(200, json.dumps({"model": "tiny", "done": True, "message": {}}).encode())

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (seen := await _head(reader)) is not None:
                is_unread = seen.target.startswith(self.unread)
                if not is_unread:
                    seen = Seen(seen.method, seen.target, seen.headers, await _body(reader, seen))
                talk = Conversation(seen, reader, writer)
                if not await self._status(talk):
                    self.seen.append(seen)
                    await self.answer(talk)
                if writer.is_closing() or is_unread:
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.connections -= 1
            writer.close()


class Held:
    """What a server does only when it is told to; `began` and `left` say how far it is."""

    def __init__(self, *lines: bytes) -> None:
        self.lines = lines or (line("working"),)
        self.began = asyncio.Semaphore(0)
        self.go = asyncio.Event()
        self.left = asyncio.Event()
        self.running = 0
        self.most = 0

    async def __call__(self, talk: Conversation) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        leaving = asyncio.ensure_future(talk.left())
        going = asyncio.ensure_future(self.go.wait())
        try:
            await talk.begin()
            for one in self.lines:
                await talk.chunk(one)
            self.began.release()
            await asyncio.wait({leaving, going}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self.left.set()
                return
            await talk.chunk(line("success"))
            await talk.end()
        finally:
            self.running -= 1
            leaving.cancel()
            going.cancel()


async def begun(held: Held) -> None:
    async with asyncio.timeout(20):
        await held.began.acquire()


async def happens(event: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await event.wait()


def line(status: str, **more: object) -> bytes:
    return json.dumps({"status": status, **more}).encode() + b"\n"


async def ask(
    front: Front,
    method: str,
    path: str,
    body: Mapping[str, Any] | bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """One request on a connection of its own, answered whole."""
    caller = await front.connect()
    try:
        await caller.raw(request(front, method, path, body, headers))
        return await (_without_body(caller) if method == "HEAD" else caller.reply())
    finally:
        caller.leave()


def request(
    front: Front,
    method: str,
    path: str,
    body: Mapping[str, Any] | bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"Host": f"127.0.0.1:{front.port}", "Content-Length": str(len(raw)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + raw


class Progress:
    """The lines of a stream that a caller gets, whatever the pieces that they come in."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._rest = b""

    async def line(self) -> Any:
        """The next line, None at the end."""
        while b"\n" not in self._rest:
            piece = await self._caller.chunk()
            if not piece:
                return None
            self._rest += piece
        first, _, self._rest = self._rest.partition(b"\n")
        return json.loads(first)


async def _without_body(caller: Caller) -> Reply:
    status, headers = await caller.head()
    return Reply(status, headers, b"", whole=True)


async def _head(reader: asyncio.StreamReader) -> Seen | None:
    head = b""
    with suppress(asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
    if not head:
        return None
    first, *lines = head.decode("latin-1").strip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return Seen(method, target, headers, b"")


async def _body(reader: asyncio.StreamReader, seen: Seen) -> bytes:
    return await reader.readexactly(int(seen.header("content-length") or 0))
