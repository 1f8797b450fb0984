"""A real relay and real exchanges, without sockets: clients and servers do what the test says."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from manager.relay.caller import read_caller
from manager.relay.exchange import Exchange
from manager.relay.relay import Limits, Relay
from manager.relay.upstream import Address, AnswerHead
from manager.services.bodies import BodyBudget
from manager.services.refusals import Refusals
from manager.services.requests import Requests
from manager.wire.access import Access
from manager.wire.caller import HeaderNames
from manager.wire.routes import INFERENCE
from tests.support.attempts import Stage
from tests.support.keys import keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest

    from manager.domain.record import RequestRecord
    from manager.wire.head import Header

CHAT, OPENAI, ANTHROPIC, EMBED = "/api/chat", "/v1/chat/completions", "/v1/messages", "/api/embed"
TINY: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
LINE = b'{"model":"tiny","message":{"role":"assistant","content":"word"},"done":false}\n'
LAST = (
    b'{"model":"tiny","message":{"role":"assistant","content":""},"done":true,'
    b'"prompt_eval_count":12,"eval_count":34}\n'
)
EVENT = b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
MAX_BODY = 4 * 2**20


class FakeConnection:
    """One connection to a server. Says what was sent on it, and what the exchange has done with it."""

    def __init__(self, pool: FakePool) -> None:
        self.address = pool.address
        self.usable = True
        self.abandoned = 0
        self.is_paused = False
        self.sink: Exchange | None = None
        self.requests: list[tuple[bytes, bytes]] = []
        self.fails_to_send: Exception | None = None
        self._pool = pool

    def send(self, sink: Exchange, head: bytes, pieces: Sequence[Any]) -> None:
        if self.fails_to_send is not None:
            raise self.fails_to_send
        self.sink = sink
        self.requests.append((head, b"".join(bytes(piece) for piece in pieces)))

    def abandon(self) -> None:
        self.abandoned += 1
        self.usable = False
        self.sink = None
        self._pool.left.discard(self)

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    # --- what the server does ---

    def head(
        self, status: int = 200, kind: bytes = b"application/x-ndjson", length: int | None = None
    ) -> None:
        sink = self.sink
        assert sink is not None
        sink.head_came(AnswerHead(status, [b"Content-Type: %b\r\n" % kind], length, kind))

    def body(self, data: bytes = b"", *, complete: bool = False) -> None:
        sink = self.sink
        if sink is None:
            return  # the connection was abandoned at the head
        if complete:
            self._free()
        sink.answer_came(data, complete=complete)

    def whole(self, status: int, body: bytes, kind: bytes = b"application/json") -> None:
        self.head(status, kind, len(body))
        self.body(body, complete=True)

    def breaks(self, why: str = "the connection broke", *, may_have_begun: bool = True) -> None:
        sink = self.sink
        assert sink is not None
        self.usable = False
        self.sink = None
        self._pool.left.discard(self)
        sink.answer_broke(why, may_have_begun=may_have_begun)

    def _free(self) -> None:
        self.sink = None
        self._pool.left.discard(self)
        self._pool.kept.append(self)


class FakePool:
    """The connections to one server. `opens` are what the next attempts to connect come to."""

    def __init__(self, endpoint: str) -> None:
        self.address = Address.of(endpoint)
        self.kept: list[FakeConnection] = []
        self.left: set[FakeConnection] = set()
        self.opens: list[Exception | asyncio.Future[None]] = []
        self.opened: list[FakeConnection] = []

    def idle(self) -> FakeConnection | None:
        if not self.kept:
            return None
        connection = self.kept.pop()
        self.left.add(connection)
        return connection

    async def connect(self) -> FakeConnection:
        outcome = self.opens.pop(0) if self.opens else None
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            await outcome
        connection = FakeConnection(self)
        self.opened.append(connection)
        self.left.add(connection)
        return connection


class FakePools:
    def __init__(self) -> None:
        self.by_endpoint: dict[str, FakePool] = {}
        self.closed = False

    def pool(self, endpoint: str) -> FakePool:
        return self.by_endpoint.setdefault(endpoint, FakePool(endpoint))

    @property
    def in_use(self) -> int:
        """Connections that are neither kept nor abandoned nor broken."""
        return sum(len(pool.left) for pool in self.by_endpoint.values())

    @property
    def open_connections(self) -> int:
        return sum(len(pool.left) + len(pool.kept) for pool in self.by_endpoint.values())

    def close_idle(self) -> int:
        kept = [connection for pool in self.by_endpoint.values() for connection in pool.kept]
        for pool in self.by_endpoint.values():
            pool.kept.clear()
        return len(kept)

    def close(self) -> None:
        self.closed = True


class FakeFront:
    """The client's connection: what was written to it, and how its exchange has ended."""

    def __init__(self) -> None:
        self.flow = SimpleNamespace(write_paused=False)
        self.written = bytearray()
        self.aborted = 0
        self.ended: list[Exchange] = []
        self.fails_to_write: Exception | None = None

    def write(self, data: bytes) -> None:
        if self.fails_to_write is not None:
            raise self.fails_to_write
        assert not self.ended, "nothing is written behind the end of an answer"
        self.written += data

    def abort(self) -> None:
        self.aborted += 1

    def exchange_ended(self, exchange: Exchange) -> None:
        self.ended.append(exchange)

    # --- what the client has got ---

    @property
    def head(self) -> str:
        return bytes(self.written).partition(b"\r\n\r\n")[0].decode("latin-1")

    @property
    def status(self) -> int:
        return int(self.head.split(" ")[1])

    @property
    def headers(self) -> dict[str, str]:
        lines = (line.partition(": ") for line in self.head.split("\r\n")[1:])
        return {name.lower(): value for name, _, value in lines}

    @property
    def body(self) -> bytes:
        """The body, out of its chunks."""
        rest = bytes(self.written).partition(b"\r\n\r\n")[2]
        if self.headers.get("transfer-encoding") != "chunked":
            return rest
        data = b""
        while (match := re.match(rb"([0-9a-f]+)\r\n", rest)) is not None and (size := int(match[1], 16)):
            data += rest[match.end() : match.end() + size]
            rest = rest[match.end() + size + 2 :]
        return data

    @property
    def is_whole(self) -> bool:
        """Whether the answer has come to the end that its framing promises."""
        if self.aborted:
            return False
        if self.headers.get("transfer-encoding") == "chunked":
            return self.written.endswith(b"0\r\n\r\n")
        return "content-length" not in self.headers or len(self.body) == int(self.headers["content-length"])

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines() if line]


class Bench:
    """A relay, its stage, and the requests that are put to it."""

    def __init__(
        self,
        stage: Stage,
        *,
        limits: Limits | None = None,
        most_buffered: int = 64 * 2**20,
        key: str | None = None,
    ) -> None:
        self.stage = stage
        self.bodies = BodyBudget(most_buffered)
        self.pools = FakePools()
        self.unloaded: list[tuple[str, str]] = []
        self.not_unloaded: dict[str, str] = {}
        self.relay = Relay(
            stage.routing,
            pools=cast("Any", self.pools),
            access=Access(allowed_hosts=["localhost"], keys=keys(key)),
            limits=limits or Limits(most_body_bytes=MAX_BODY),
            bodies=self.bodies,
            requests=Requests(HeaderNames(), default_project="default"),
            refusals=Refusals(now=stage.clock),
            unload=self._unload,
        )

    async def _unload(self, instance: str, model: str) -> str | None:
        self.unloaded.append((instance, model))
        return self.not_unloaded.get(instance)

    @property
    def clock(self) -> Any:
        return self.stage.clock

    def pool(self, instance: str = "a") -> FakePool:
        return self.pools.pool(f"http://{instance}:11434")

    def kept(self, instance: str = "a") -> FakeConnection:
        """Return a connection that an earlier request has left for the next one."""
        connection = FakeConnection(self.pool(instance))
        self.pool(instance).kept.append(connection)
        return connection

    def begin(
        self,
        path: str = CHAT,
        *headers: Header,
        keep_alive: bool = True,
        chunks: bool = True,
        front: FakeFront | None = None,
        turn: bool = True,
    ) -> tuple[Exchange, FakeFront]:
        """Return a request whose head has come, and its client."""
        route = INFERENCE[path.encode()]
        client = front or FakeFront()
        caller = read_caller(self.relay, route, [(b"host", b"localhost"), *headers])
        exchange = Exchange(
            self.relay,
            cast("Any", client),
            route,
            caller,
            target=path.encode(),
            keep_alive=keep_alive,
            chunks=chunks,
            expects_continue=False,
        )
        if turn:
            exchange.turn_came()
        return exchange, client

    def ask(
        self, body: Any = TINY, path: str = CHAT, *headers: Header, **more: Any
    ) -> tuple[Exchange, FakeFront]:
        """Return a request that has come whole, and its client."""
        exchange, client = self.begin(path, *headers, **more)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        exchange.body_came(raw)
        exchange.request_ended()
        return exchange, client

    def check(self, exchange: Exchange, seconds: float = 0.0) -> None:
        """Let so much time pass, and then look at the deadlines."""
        exchange.check(self.stage.clock.advance(seconds))

    async def settle(self) -> None:
        """Let every task come to the next thing that it waits for."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def until(self, holds: Callable[[], object]) -> None:
        """Let tasks go on until something holds: a large body takes many steps."""
        while not holds():  # noqa: ASYNC110  (there is no event to wait for)
            await asyncio.sleep(0)

    @property
    def record(self) -> RequestRecord:
        """The record of the latest request that has ended."""
        return self.stage.ended[-1]

    def at_rest(self) -> bool:
        """Whether nothing of any request is left."""
        return (
            not self.relay.exchanges
            and not self.relay.open_tasks
            and not self.stage.placement.held
            and not self.bodies.held_bytes
            and not self.pools.in_use
            and not self.relay.loads._waiting
            and not self.stage.status.at_work()
            and sorted(self.stage.placement.granted) == sorted(self.stage.placement.released)
        )


def bench_of(monkeypatch: pytest.MonkeyPatch, *attempts: Any, **more: Any) -> Bench:
    stage = Stage(*attempts)
    stage.use_clock(monkeypatch)
    monkeypatch.setattr("manager.relay.timers.monotonic", stage.clock)  # should a tick come meanwhile
    return Bench(stage, **more)
