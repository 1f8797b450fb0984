"""Parts of models pass through whole: no size is too large, no side faster than the other."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from tests.support.inside import until
from tests.support.relaying import Conversation, relaying
from tests.support.storing import Store, ask, happens, line, request

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemon import Daemon

TINY = {"model": "tiny"}
BLOB = "/api/blobs/sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
MIB = 2**20


async def received(talk: Conversation) -> bytes:
    length = int(talk.seen.header("content-length") or 0)
    return await talk.reader.readexactly(length)


async def test_a_blob_passes_whole_whatever_its_size(tmp_path: Path) -> None:
    got = hashlib.sha256()

    async def store(talk: Conversation) -> None:
        left = int(talk.seen.header("content-length") or 0)
        while left:
            piece = await talk.reader.read(min(left, MIB))
            left -= len(piece)
            got.update(piece)
        await talk.send(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    piece = bytes(range(256)) * (MIB // 256)
    wanted = hashlib.sha256()
    gateway = {"max_body": "2m"}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, gateway=gateway) as front:
        server.on["/api/blobs"] = store
        caller = await front.connect()
        head = request(front, "POST", BLOB, None, {"Content-Length": str(100 * MIB)})
        await caller.raw(head)
        for _ in range(100):
            wanted.update(piece)
            await caller.raw(piece)
        reply = await caller.reply()
        caller.leave()
        assert (reply.status, reply.headers["x-instance"]) == (201, "a")
        assert "x-model" not in reply.headers
        assert got.digest() == wanted.digest()
        record = await front.record()
        assert (record.path, record.outcome) == ("/api/blobs", "ok")


async def test_a_blob_in_chunks_stays_in_chunks_and_heads_pass(tmp_path: Path) -> None:
    seen: list[bytes] = []

    async def store(talk: Conversation) -> None:
        if talk.seen.method == "HEAD":
            await talk.send(b"HTTP/1.1 404 X\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n")
            return
        assert talk.seen.header("transfer-encoding") == "chunked"
        while size := int(await talk.reader.readuntil(b"\r\n"), 16):
            seen.append(await talk.reader.readexactly(size))
            await talk.reader.readexactly(2)
        await talk.send(b"HTTP/1.1 201 X\r\nContent-Length: 0\r\n\r\n")

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = store
        caller = await front.connect()
        host = f"Host: 127.0.0.1:{front.port}"
        await caller.raw(f"POST {BLOB} HTTP/1.1\r\n{host}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await caller.raw(b"5\r\nhello\r\n5\r\nworld\r\n0\r\n\r\n")
        assert (await caller.reply()).status == 201
        assert b"".join(seen) == b"helloworld"
        caller.leave()
        reply = await ask(front, "HEAD", BLOB)
        assert (reply.status, reply.headers["content-length"]) == (404, "20")


async def test_a_look_for_a_blob_is_answered_by_whoever_runs_and_starts_nobody(tmp_path: Path) -> None:
    async def gone(talk: Conversation) -> bool:
        talk.crash()
        return True

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = lambda talk: talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert (await ask(front, "HEAD", BLOB)).status == 200
        server._status = gone  # type: ignore[method-assign]
        await until(lambda: front.daemon.fleet.get("a").usable_endpoint() is None, within_s=20)
        reply = await ask(front, "HEAD", BLOB)
        assert (reply.status, reply.headers["content-type"]) == (404, "application/json; charset=utf-8")
        assert "x-instance" not in reply.headers
        assert len(server.seen) == 1
        await until(lambda: len(front.records) == 2)
        assert front.records[-1].outcome == "client_error"


async def test_a_look_for_a_blob_leaves_a_stopped_container_stopped(daemon: Daemon) -> None:
    answer = daemon.call("HEAD", BLOB)
    assert answer.status_code == 404
    assert {daemon.instance(name)["phase"] for name in ("cpu", "second")} == {"stopped"}
    daemon.started("cpu")
    assert daemon.call("HEAD", BLOB).headers["x-instance"] == "cpu"


async def test_a_server_that_does_not_read_holds_the_upload_up(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def wait_then_store(talk: Conversation) -> None:
        await go.wait()
        await received(talk)
        await talk.send(b"HTTP/1.1 201 X\r\nContent-Length: 0\r\n\r\n")

    size = 64 * MIB
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = wait_then_store
        caller = await front.connect()
        await caller.raw(request(front, "POST", BLOB, None, {"Content-Length": str(size)}))
        sent = 0

        async def send() -> None:
            nonlocal sent
            while sent < size:
                await caller.raw(bytes(MIB))
                sent += MIB

        sending = asyncio.ensure_future(send())
        before = -1
        while before != sent or not server.seen:
            before = sent
            await asyncio.wait({sending}, timeout=0.3)
        assert sent < 40 * MIB, "no more than what the sockets and readers on the way hold"
        go.set()
        await sending
        assert (await caller.reply()).status == 201
        caller.leave()


async def test_an_upload_that_is_too_large_is_refused_and_ends_at_the_server_too(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def read(talk: Conversation) -> None:
        await talk.left()
        left.set()

    gateway = {"max_upload": "1m"}
    async with Store().serving() as server, relaying(tmp_path, {"a": server}, gateway=gateway) as front:
        server.on["/api/blobs"] = read
        reply = await ask(front, "POST", BLOB, bytes(MIB + 1))
        assert reply.status == 413
        assert reply.json()["error"] == "the request body is too large: at most 1048576 bytes are taken"
        await happens(left)
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_error"


async def test_a_caller_that_leaves_in_the_middle_of_an_upload_ends_it(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def read(talk: Conversation) -> None:
        await talk.left()
        left.set()

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = read
        caller = await front.connect()
        await caller.raw(request(front, "POST", BLOB, None, {"Content-Length": str(MIB)}))
        await caller.raw(b"x" * 1000)
        await until(lambda: server.seen)
        caller.leave()
        await happens(left)
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_gone"


async def test_an_answer_before_the_end_of_an_upload_is_the_callers(tmp_path: Path) -> None:
    async def refuse(talk: Conversation) -> None:
        await talk.whole(400, b'{"error":"no room"}')

    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.on["/api/blobs"] = refuse
        caller = await front.connect()
        await caller.raw(request(front, "POST", BLOB, None, {"Content-Length": str(10 * MIB)}))
        await caller.raw(b"x" * 1000)
        reply = await caller.reply()
        assert (reply.status, reply.json()) == (400, {"error": "no room"})
        caller.leave()
        await until(lambda: front.at_rest)


async def test_a_caller_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def endless(talk: Conversation) -> None:
        await talk.begin()
        try:
            while True:
                await talk.chunk(line("x" * 60_000))
        finally:
            left.set()

    async with (
        Store().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 0.5}) as front,
    ):
        server.on["/api/push"] = endless
        caller = await front.connect()
        await caller.raw(request(front, "POST", "/api/push", TINY))
        await until(lambda: front.records, within_s=30)
        assert front.records[0].outcome == "timeout"
        await happens(left)
        await until(lambda: front.at_rest)
        caller.leave()
