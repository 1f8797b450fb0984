"""Probes against servers that answer in every way but the usual one."""

from __future__ import annotations

import asyncio
import json
import socketserver
import time
from contextlib import asynccontextmanager, suppress
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from manager.adapters.tls import SharedTls
from manager.adapters.upstream import HttpUpstream
from manager.errors import OutOfDescriptorsError, Reason, UnavailableError
from manager.wire.details import Details
from tests.support.sockets import no_descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

VERSION = b'{"version": "0.24.0"}'
TIMEOUT_S = 5.0
SHORT_S = 0.2


def head(length: int | None, status: str = "200 OK", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", *more]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def answer(body: bytes, status: str = "200 OK", *more: str) -> list[bytes]:
    return [head(len(body), status, *more) + body]


class Server(socketserver.ThreadingTCPServer):
    """Sends the pieces that a path is given, each on its own; then nothing, or the end with `hang_up`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.pieces: dict[str, list[bytes]] = {"/api/version": answer(VERSION)}
        self.hang_up = False
        self.asked: list[str] = []
        self.connections = 0


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: Server

    def handle(self) -> None:
        self.server.connections += 1
        with suppress(OSError):
            while request := self.rfile.readline():
                path = request.split()[1].decode()
                self.server.asked.append(path)
                length = 0
                while (line := self.rfile.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.partition(b":")[2])
                self.rfile.read(length)
                for piece in self.server.pieces.get(path, answer(b"404 page not found", "404 Not Found")):
                    self.wfile.write(piece)
                    time.sleep(0.001)  # lets the other end read this piece before the next one is sent
                if self.server.hang_up:
                    return


@asynccontextmanager
async def probing() -> AsyncIterator[tuple[HttpUpstream, Server]]:
    with Server() as server:
        serving = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            async with HttpUpstream(SharedTls().context) as upstream:
                yield upstream, server
        finally:
            server.shutdown()
            serving.join()


async def test_a_body_in_many_pieces_is_read_to_its_end() -> None:
    models = [{"name": f"model-{number}:latest", "digest": "0" * 64} for number in range(500)]
    body = json.dumps({"models": models}).encode()
    async with probing() as (upstream, server):
        pieces = [body[start : start + 4096] for start in range(0, len(body), 4096)]
        server.pieces["/api/tags"] = [head(len(body)), *pieces]
        server.pieces["/api/ps"] = [head(len(body)), body[:1], body[1:]]
        told = await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=True)
    assert told.available == tuple(models)
    assert told.loaded is not None
    assert len(told.loaded) == 500
    assert told.wire_bytes > 2 * len(body)


async def test_only_what_is_needed_is_asked_of_the_server() -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/ps"] = answer(b'{"models": []}')
        told = await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
        assert server.asked == ["/api/ps"]
        assert (told.version, told.loaded, told.available) == (None, (), None)


async def test_a_server_that_does_not_say_what_it_has_loaded_is_asked_who_it_is() -> None:
    async with probing() as (upstream, server):
        told = await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
        assert server.asked == ["/api/ps", "/api/version"]
        assert (told.version, told.loaded, told.available) == ("0.24.0", None, None)


@pytest.mark.parametrize(
    "body", [b"", b"not JSON", b"[]", b'{"models": null}', b'{"models": [1]}', b"\xff\xfe"]
)
async def test_an_odd_list_is_no_list_and_no_error(body: bytes) -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/ps"] = server.pieces["/api/tags"] = answer(body)
        told = await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=True)
    assert told.loaded in (None, ())
    assert told.available in (None, ())


@pytest.mark.parametrize(
    "pieces",
    [
        answer(b'{"name": "somebody else"}'),
        answer(b"Ollama is running"),
        answer(VERSION, "500 Internal Server Error"),
        answer(VERSION, "302 Found", "Location: /elsewhere"),
    ],
)
async def test_a_server_that_does_not_answer_as_ollama_does_is_unhealthy(pieces: list[bytes]) -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/version"] = pieces
        server.pieces["/elsewhere"] = answer(VERSION)
        with pytest.raises(UnavailableError) as caught:
            await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=True)
        assert server.asked == ["/api/ps", "/api/version"]  # a redirect is not followed
    assert caught.value.reason is Reason.INSTANCE_UNHEALTHY


@pytest.mark.parametrize(
    "pieces", [[], [b"HTTP/1.1 200 OK\r\n"], [head(len(VERSION))], [head(len(VERSION)), VERSION[:5]]]
)
async def test_a_server_that_stalls_at_any_point_is_unhealthy_at_the_deadline(pieces: list[bytes]) -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/version"] = pieces
        with pytest.raises(UnavailableError, match=r"did not answer within 0\.2 s") as caught:
            await upstream.probe(server.url, timeout_s=SHORT_S, tags=False)
        assert caught.value.reason is Reason.INSTANCE_UNHEALTHY
        assert not await upstream.answers(f"{server.url}/api/version", SHORT_S)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"SSH-2.0-OpenSSH_9.2\r\n"],
        [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"],
        answer(VERSION, "000 X"),
        answer(VERSION, "99 X"),
        answer(VERSION, "999 X"),
        answer(VERSION, "200 OK", "bad name: x"),
        answer(VERSION, "200 OK", ": x"),
        answer(VERSION, "200 OK", "a: \x01"),
        answer(VERSION, "200 OK", "Content-Length: 3"),
        answer(VERSION, "200 OK", "Transfer-Encoding: chunked"),
        [b"HTTP/1.1 102 Processing\r\n\r\n" * 20, *answer(VERSION)],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"T: x\r\n" * 1000 + b"\r\n"],
        [b""],
        [head(len(VERSION)), VERSION[:5]],
        [head(9 * 2**20), bytes(9 * 2**20)],
    ],
)
async def test_a_server_that_breaks_off_or_never_ends_is_unreachable(pieces: list[bytes]) -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/version"] = pieces
        server.hang_up = True
        with pytest.raises(UnavailableError, match="cannot be reached") as caught:
            await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
        assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE
        assert not await upstream.answers(f"{server.url}/api/version", TIMEOUT_S)


async def test_nobody_there_is_unreachable() -> None:
    async with probing() as (upstream, server):
        pass
    async with HttpUpstream(SharedTls().context) as upstream:
        with pytest.raises(UnavailableError) as caught:
            await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
        assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE
        assert not await upstream.answers(f"{server.url}/api/version", TIMEOUT_S)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (answer(VERSION), True),
        (answer(b"anything", "201 Created"), True),
        ([b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", *answer(VERSION)], True),
        ([b"HTTP/1.1 103 Early Hints\r\n\r\n", *answer(b"", "503 Service Unavailable")], False),
        ([b"HTTP/1.1 100 Continue\r\n\r\n" + answer(VERSION)[0]], True),
        ([b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n"], True),
        (answer(b"", "302 Found", "Location: /api/version"), False),
        (answer(b"", "404 Not Found"), False),
        (answer(b"", "503 Service Unavailable"), False),
    ],
)
async def test_only_a_complete_2xx_is_an_answer(pieces: list[bytes], expected: bool) -> None:
    async with probing() as (upstream, server):
        server.pieces["/ready"] = pieces
        assert await upstream.answers(f"{server.url}/ready", TIMEOUT_S) is expected


async def test_a_url_is_asked_as_it_is_written() -> None:
    async with probing() as (upstream, server):
        await upstream.answers(f"{server.url}/ready?deep=yes", TIMEOUT_S)
        assert server.asked == ["/ready?deep=yes"]


async def test_a_url_that_is_none_is_no_answer() -> None:
    async with HttpUpstream(SharedTls().context) as upstream:
        assert not await upstream.answers("http://[::1/", SHORT_S)


async def test_a_lack_of_descriptors_is_not_the_servers_fault() -> None:
    async with probing() as (upstream, server):
        with no_descriptors():
            with pytest.raises(OutOfDescriptorsError):
                await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
            assert not await upstream.answers(f"{server.url}/api/version", TIMEOUT_S)
        assert await upstream.answers(f"{server.url}/api/version", TIMEOUT_S)


# --- connections ---


async def counted(server: Server, paths: int) -> int:
    """Ask so many times; how many connections that took."""
    before = server.connections
    async with HttpUpstream(SharedTls().context) as upstream:
        for _ in range(paths):
            assert await upstream.answers(f"{server.url}/api/version", TIMEOUT_S)
    return server.connections - before


@pytest.mark.parametrize(
    ("pieces", "connections"),
    [
        (answer(VERSION), 1),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n", b"{}\r\n0\r\n", b"\r\n"], 1),
        (answer(VERSION, "200 OK", "Connection: close"), 3),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"], 3),
        ([answer(VERSION)[0] + b"and more"], 3),
    ],
)
async def test_a_connection_is_kept_as_long_as_both_sides_keep_it(
    pieces: list[bytes], connections: int
) -> None:
    async with probing() as (_, server):
        server.pieces["/api/version"] = pieces
        assert await counted(server, 3) == connections


async def test_a_connection_that_the_server_has_closed_meanwhile_is_made_anew() -> None:
    async with probing() as (_, server):
        server.hang_up = True
        assert await counted(server, 3) == 3


async def test_a_body_that_ends_with_its_connection_is_read_to_its_end() -> None:
    async with probing() as (upstream, server):
        server.hang_up = True
        server.pieces["/api/ps"] = [b"HTTP/1.1 200 OK\r\n\r\n", b'{"models": ', b"[]}"]
        told = await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
        assert told.loaded == ()


async def test_a_head_without_an_end_is_given_up() -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/ps"] = [b"HTTP/1.1 200 OK\r\n"] + [b"X: " + b"x" * 1000 + b"\r\n"] * 100
        with pytest.raises(UnavailableError, match="a head of more than") as caught:
            await upstream.probe(server.url, timeout_s=TIMEOUT_S, tags=False)
        assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE


async def test_questions_at_once_do_not_wait_for_each_other() -> None:
    async with probing() as (upstream, server):
        server.pieces["/slow"] = []
        slow = asyncio.ensure_future(upstream.answers(f"{server.url}/slow", TIMEOUT_S))
        while not server.asked:  # noqa: ASYNC110  (the server is a thread)
            await asyncio.sleep(0.001)
        assert await upstream.answers(f"{server.url}/api/version", TIMEOUT_S)
        slow.cancel()
        await asyncio.wait({slow})
        assert server.asked == ["/slow", "/api/version"]


# --- details of models ----------------------------------------------------------------------------


async def test_a_model_is_shown_and_the_bytes_are_counted() -> None:
    async with probing() as (upstream, server):
        body = json.dumps({"capabilities": ["completion"], "licence": "x" * 10_000}).encode()
        server.pieces["/api/show"] = answer(body)
        shown = await upstream.show(server.url, "tiny", timeout_s=TIMEOUT_S)
        assert server.asked == ["/api/show"]
    assert shown.details == Details(None, ("completion",))
    assert 10_000 < shown.wire_bytes < 13_000


async def test_a_model_that_a_server_does_not_show_has_no_details() -> None:
    async with probing() as (upstream, server):
        assert (await upstream.show(server.url, "tiny", timeout_s=TIMEOUT_S)).details is None
        server.pieces["/api/show"] = answer(b"no JSON")
        assert (await upstream.show(server.url, "tiny", timeout_s=TIMEOUT_S)).details is None


async def test_an_answer_about_a_model_is_bounded_in_size_and_time() -> None:
    async with probing() as (upstream, server):
        server.pieces["/api/show"] = answer(b" " * (2**20 + 1))
        with pytest.raises(UnavailableError, match="more than 1048576 bytes"):
            await upstream.show(server.url, "tiny", timeout_s=TIMEOUT_S)
        server.pieces["/api/show"] = [head(5)]
        with pytest.raises(UnavailableError, match="did not answer within"):
            await upstream.show(server.url, "tiny", timeout_s=SHORT_S)
