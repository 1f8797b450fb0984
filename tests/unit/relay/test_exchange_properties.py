"""Whatever clients and servers do, in whichever order: nothing is left, and each request ends once."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from manager.relay.relay import Limits
from tests.support.attempts import attempt, unavailable
from tests.support.exchanging import ANTHROPIC, CHAT, EVENT, LAST, LINE, OPENAI, bench_of

if TYPE_CHECKING:
    from manager.relay.exchange import Exchange
    from tests.support.exchanging import Bench, FakeConnection, FakeFront

BODY = json.dumps({"model": "tiny", "stream": True, "messages": []}).encode()
LARGE = json.dumps({"model": "tiny", "stream": True, "pad": "x" * 70_000}).encode()
SERVER_MOVES = ("ok", "stream", "full", "failed", "missing", "some", "all", "breaks", "is stale", "floods")
CLIENT_MOVES = ("sends", "sends much", "ends", "leaves", "stops reading", "reads")
OTHER_MOVES = ("turn", "tick", "long tick", "hour", "cut", "silence", "goes")
MOVES = st.tuples(st.integers(0, 1), st.sampled_from((*SERVER_MOVES, *CLIENT_MOVES, *OTHER_MOVES)))


class Play:
    """Two requests that may wait for the same load, and what is done to them."""

    def __init__(self, bench: Bench, path: str, *, chunks: bool) -> None:
        self.bench = bench
        self.path = path
        self.requests: list[tuple[Exchange, FakeFront]] = [
            bench.begin(path, chunks=chunks, keep_alive=chunks) for _ in range(2)
        ]
        self.left: dict[int, int] = {}
        self.heads: set[FakeConnection] = set()

    async def does(self, number: int, move: str) -> None:
        exchange, _ = self.requests[number]
        if move in SERVER_MOVES:
            connection: Any = exchange._connection
            if connection is not None and connection.sink is exchange:
                self._server(connection, move)
        elif move in CLIENT_MOVES:
            if number not in self.left:
                self._client(number, move)
        else:
            await self._other(exchange, move)

    def _server(self, connection: FakeConnection, move: str) -> None:
        status = {"ok": 200, "stream": 200, "full": 503, "failed": 500, "missing": 404}.get(move)
        if status is not None and connection not in self.heads:
            self.heads.add(connection)
            connection.head(status, b"text/event-stream" if move == "stream" else b"application/json")
            connection.body()
        elif connection in self.heads and move in ("some", "all", "floods"):
            data = LINE if self.path == CHAT else EVENT
            connection.body(LAST if move == "all" else data * (2000 if move == "floods" else 1))
            if move == "all":
                self.heads.discard(connection)
                connection.body(complete=True)
        elif move == "breaks":
            connection.breaks()
        elif move == "is stale" and connection not in self.heads:
            connection.breaks(may_have_begun=False)

    def _client(self, number: int, move: str) -> None:
        exchange, client = self.requests[number]
        match move:
            case "sends" | "sends much":
                if not exchange.received:
                    exchange.body_came(BODY if move == "sends" else LARGE)
            case "ends":
                if not exchange.received:
                    exchange.request_ended()
            case "leaves":
                if not client.ended:
                    self.left[number] = len(client.written)
                exchange.caller_left()
            case "stops reading":
                client.flow.write_paused = True
                exchange.pause()
            case _:
                client.flow.write_paused = False
                exchange.resume()

    async def _other(self, exchange: Exchange, move: str) -> None:
        bench = self.bench
        match move:
            case "turn":
                await asyncio.sleep(0)
            case "goes":
                await bench.settle()
            case "silence":
                bench.stage.placement.silent ^= {"a"}
            case "cut":
                exchange.cut("because")
            case _:
                seconds = {"tick": 0.25, "long tick": 61.0, "hour": 3600.0}[move]
                bench.stage.clock.advance(seconds)
                for one in tuple(bench.relay.exchanges):
                    one.check(bench.stage.clock())

    async def ends(self) -> None:
        await self.bench.settle()
        for exchange, _ in self.requests:
            exchange.cut("the end of the test")
        await self.bench.settle()
        await self.bench.until(lambda: not self.bench.relay.open_tasks)


@given(
    st.lists(MOVES, max_size=25),
    st.sampled_from([CHAT, OPENAI, ANTHROPIC]),
    st.sampled_from(["loaded", "running", "startable"]),
    st.sampled_from([None, 5.0, "fails", "defect"]),
    st.lists(st.booleans(), max_size=3),
    st.booleans(),
)
def test_nothing_is_left_of_any_request_and_each_ends_once(  # noqa: PLR0917
    moves: list[tuple[int, str]],
    path: str,
    because: Any,
    prepared: Any,
    refused: list[bool],
    chunks: bool,
) -> None:
    async def play() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch, capture_logs():
            limits = Limits(most_body_bytes=200_000, keep_alive_s=1.0)
            ways = [attempt("a", because), attempt("b", "running")]
            bench = bench_of(monkeypatch, *ways, limits=limits, most_buffered=300_000)
            failures = {"fails": unavailable(), "defect": ZeroDivisionError()}
            if because == "startable" or prepared is not None:
                bench.stage.placement.prepares = {"a": failures.get(prepared, prepared)}
            new_future = asyncio.get_running_loop().create_future
            bench.pool("a").opens = [ConnectionRefusedError() if how else new_future() for how in refused]
            played = Play(bench, path, chunks=chunks)
            # Most plays have a request to speak of.
            for number in (0, 1):
                await played.does(number, "sends")
                await played.does(number, "ends" if number else "turn")
            for number, move in moves:
                await played.does(number, move)
                assert bench.bodies.held_bytes <= 300_000
            await played.ends()
            assert bench.at_rest()
            assert len(bench.stage.ended) == 2
            for number, (exchange, client) in enumerate(played.requests):
                assert client.ended == ([] if number in played.left else [exchange])
                assert len(client.written) == played.left.get(number, len(client.written))
                assert client.written.count(b"HTTP/1.1 ") <= 1
                assert exchange.response_complete

    asyncio.run(play())
