"""A gateway on the test's event loop in front of servers that do what the test says, over real sockets."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import uvicorn
import yaml

import manager.app
import manager.daemon
from manager.adapters.log_writer import LogWriter
from manager.relay.front import listening_with
from manager.serving import Server
from manager.settings import load_settings
from manager.web.app import application
from manager.wire.access import Access
from tests.support.inside import until
from tests.support.keys import keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

    from manager.domain.record import RequestRecord
    from manager.relay.deadlines import Deadlines
    from manager.relay.relay import Relay

CHAT = "/api/chat"
LINE = b'{"model":"tiny","message":{"role":"assistant","content":"word"},"done":false}\n'
LAST = (
    b'{"model":"tiny","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop",'
    b'"prompt_eval_count":12,"eval_count":34}\n'
)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as a server saw it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class Conversation:
    """What a server may do with one inference request."""

    def __init__(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen = seen
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def begin(self, content_type: str = "application/x-ndjson", extra: str = "") -> None:
        await self.send(
            f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\n{extra}"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def whole(self, status: int, body: bytes, extra: str = "") -> None:
        await self.send(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{extra}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def left(self) -> None:
        """Wait until the one who asked has closed the connection."""
        async with asyncio.timeout(20):
            with suppress(ConnectionError):
                while await self.reader.read(65536):
                    pass

    def crash(self) -> None:
        self.writer.transport.abort()


Answer = "Callable[[Conversation], Awaitable[None]]"


async def a_word(talk: Conversation) -> None:
    """A whole answer, streamed or not, as the request says."""
    if talk.seen.json().get("stream", True):
        await talk.begin()
        await talk.chunk(LINE)
        await talk.chunk(LAST)
        await talk.end()
    else:
        await talk.whole(200, LAST.strip())


async def floods(talk: Conversation) -> None:
    """An answer that never ends, as fast as it is taken."""
    await talk.begin()
    while not talk.writer.is_closing():
        await talk.chunk(LINE * 1000)


class Scripted:
    """A server with Ollama's status routes, whose inference is what `answer` does."""

    def __init__(self, models: tuple[str, ...] = ("tiny",), loaded: tuple[str, ...] = ()) -> None:
        self.models = models
        self.loaded = loaded
        self.digest = "d"
        self.answer: Callable[[Conversation], Awaitable[None]] = a_word
        self.seen: list[Seen] = []
        self.connections = 0
        self.port = 0
        self._talks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Scripted]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=2**22, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for talk in self._talks:
                talk.cancel()
            await asyncio.gather(*self._talks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio's own task for a coroutine logs an error if it is cancelled (Python 3.11.5 to 3.11.7).
        talk = asyncio.create_task(self._talk(reader, writer))
        self._talks.add(talk)
        talk.add_done_callback(self._talks.discard)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (seen := await _read(reader)) is not None:
                talk = Conversation(seen, reader, writer)
                if not await self._status(talk):
                    self.seen.append(seen)
                    await self.answer(talk)
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.connections -= 1
            writer.close()

    async def _status(self, talk: Conversation) -> bool:
        entry = {
            "size": 1,
            "digest": self.digest,
            "size_vram": 0,
            "expires_at": "2318-01-01T00:00:00Z",
            "details": {},
        }
        match talk.seen.target:
            case "/api/version":
                answer: Any = {"version": "0.24.0"}
            case "/api/tags":
                answer = {"models": [{"name": f"{name}:latest", **entry} for name in self.models]}
            case "/api/ps":
                answer = {"models": [{"name": f"{name}:latest", **entry} for name in self.loaded]}
            case _:
                return False
        await talk.whole(200, json.dumps(answer).encode())
        return True


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip("\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
    return Seen(method, target, headers, await reader.readexactly(length))


@dataclass(slots=True)
class Front:
    """The gateway as a caller sees it, with what it holds inside; `to_the_log` is where records else go."""

    daemon: manager.app.Daemon
    relay: Relay
    server: Any
    port: int
    records: list[RequestRecord] = field(default_factory=list)
    to_the_log: Any = None
    log: Any = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def in_flight(self, instance: str) -> int:
        return self.daemon.fleet.get(instance).in_flight

    def kinds(self) -> list[str]:
        return [event.kind for event in self.daemon.backend.journal._recent]

    @property
    def at_rest(self) -> bool:
        """Whether nothing of any request is left."""
        return (
            not self.relay.exchanges
            and not self.relay.open_tasks
            and all(not instance.in_flight for instance in self.daemon.fleet.instances())
        )

    async def record(self, number: int = -1) -> RequestRecord:
        """A record, once so many requests have ended."""
        await until(lambda: len(self.records) > number if number >= 0 else self.records, within_s=20)
        return self.records[number]

    async def connect(self) -> Caller:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        return Caller(reader, writer, self.port)

    async def ask(
        self, body: Mapping[str, Any] | bytes, path: str = CHAT, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request on a connection of its own, answered whole."""
        caller = await self.connect()
        try:
            await caller.send(body, path, headers)
            return await caller.reply()
        finally:
            caller.leave()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer. `whole` is whether it came to the end that its framing promised."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines() if line]


class Caller:
    """A client over a bare socket, so that it can do what libraries would not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        self.reader = reader
        self.writer = writer
        self._port = port

    async def send(
        self, body: Mapping[str, Any] | bytes, path: str = CHAT, headers: Mapping[str, str] | None = None
    ) -> None:
        await self.raw(self.request(body, path, headers))

    def request(
        self, body: Mapping[str, Any] | bytes, path: str = CHAT, headers: Mapping[str, str] | None = None
    ) -> bytes:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        lines += f"Content-Length: {len(raw)}\r\n"
        return f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n{lines}\r\n".encode() + raw

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(30):
            text = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = text.strip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(first.split(" ")[1]), headers

    async def chunk(self) -> bytes:
        """One chunk of a body; empty at its end."""
        async with asyncio.timeout(30):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def reply(self) -> Reply:
        status, headers = await self.head()
        body, whole = b"", True
        async with asyncio.timeout(60):
            try:
                if headers.get("transfer-encoding") == "chunked":
                    while piece := await self.chunk():
                        body += piece
                elif "content-length" in headers:
                    body = await self.reader.readexactly(int(headers["content-length"]))
                else:
                    body = await self.reader.read(-1)
            except (asyncio.IncompleteReadError, ConnectionError):
                whole = False
        return Reply(status, headers, body, whole)

    async def ended(self) -> bytes:
        """What still comes until the other side closes the connection."""
        async with asyncio.timeout(30):
            with suppress(ConnectionError):
                return await self.reader.read(-1)
        return b""

    def leave(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def _no_engine(path: Path) -> AsyncIterator[None]:
    """An engine that refuses everything; where there is none the SDK leaves a socket open."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(refuse, path)
    try:
        yield
    finally:
        server.close()


@asynccontextmanager
async def relaying(
    home: Path,
    servers: Mapping[str, Scripted],
    *,
    gateway: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    devices: Mapping[str, str] | None = None,
    slots: Mapping[str, int] | None = None,
    key: str | None = None,
    deadlines: Deadlines | None = None,
) -> AsyncIterator[Front]:
    """A gateway whose instances are these servers, all of them read and healthy; `config` may add others."""
    file = home / "config.yaml"
    instances = {
        name: {
            "driver": "external",
            "url": server.url,
            **({"device": devices[name]} if devices else {}),
            **({"slots": slots[name]} if slots and name in slots else {}),
        }
        for name, server in servers.items()
    }
    file.write_text(
        yaml.safe_dump(
            {
                "engine": {"url": f"unix://{home}/engine.sock"},
                "state": {"dir": str(home / "state")},
                "gpus": "none",
                "instances": instances,
                "lifecycle": {"probe_interval_s": 0.2, "resync_interval_s": 0.5},
                "gateway": dict(gateway or {}),
                **(config or {}),
            }
        )
    )
    loaded = load_settings(file)
    log = LogWriter(2)
    async with _no_engine(home / "engine.sock"), manager.app.open_daemon(loaded, log=log) as daemon:
        access = Access(allowed_hosts={"127.0.0.1", "localhost"}, keys=keys(key))
        relay = manager.daemon.relay_of(daemon, loaded.settings, access)
        server = Server(
            uvicorn.Config(
                application(daemon.backend, access=access),
                port=0,
                http=listening_with(relay, deadlines=deadlines),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=1,
            ),
            (relay.drain, daemon.backend.passing.passages.drain, daemon.backend.runs.drain),
            loaded.settings.gateway.drain_timeout_s,
        )
        running = asyncio.ensure_future(daemon.run())
        serving = asyncio.ensure_future(server.serve())
        try:
            await until(lambda: server.started)
            await until(
                lambda: all(
                    instance.usable_endpoint() is not None and instance.available_models is not None
                    for instance in map(daemon.fleet.get, servers)
                ),
                within_s=20,
            )
            port = server.servers[0].sockets[0].getsockname()[1]
            traffic = daemon.backend.passing.routing.traffic
            front = Front(daemon, relay, server, port, to_the_log=traffic._write, log=log)
            traffic._write = front.records.append
            yield front
            assert not running.done(), running.exception()
        finally:
            server._cut.set()
            server.should_exit = True
            await serving
            await relay.close()
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            log.close()
