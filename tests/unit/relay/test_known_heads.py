"""A head that a connection has parsed twice is not parsed a third time, and means the same as if it were.

Requirement U-7: what a server gets does not depend on how its client's bytes come.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inside import until
from tests.support.keys import keys
from tests.support.relaying import Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path

    from manager.relay.front import Front


def request(
    content: str,
    *,
    length: str | None = None,
    extra: str = "",
    name: str = "Content-Length",
    last: bool = False,
) -> bytes:
    """A request whose length is declared as given; `extra` headers come before it, or `last`."""
    body = json.dumps({"model": "tiny", "stream": False, "prompt": content}).encode()
    declared = str(len(body)) if length is None else length.format(len(body))
    before, after = ("", extra) if last else (extra, "")
    head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n{before}{name}: {declared}\r\n{after}\r\n"
    return head.encode() + body


def fronts(front: Any) -> list[Front]:
    return list(front.server.server_state.connections)


async def test_the_third_head_that_is_alike_is_not_parsed(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        for content in ("one", "number two", "three", "f" * 4000, ""):
            await caller.raw(request(content))
            assert (await caller.reply()).status == 200
        (connection,) = fronts(front)
        calls: list[int] = []
        connection.on_message_begin = lambda: calls.append(1)  # type: ignore[method-assign]
        await caller.raw(request("six"))
        assert (await caller.reply()).status == 200
        assert not calls
        assert [seen.json()["prompt"] for seen in server.seen] == [
            "one", "number two", "three", "f" * 4000, "", "six",
        ]  # fmt: skip
        caller.leave()


async def test_a_new_connection_knows_the_head_of_another_one(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for content in ("one", "two"):  # the first is parsed, and the second is found to be like it
            caller = await front.connect()
            await caller.raw(request(content))
            assert (await caller.reply()).status == 200
            caller.leave()
        await until(lambda: not fronts(front))
        caller = await front.connect()
        await until(lambda: fronts(front))
        (connection,) = fronts(front)
        calls: list[int] = []
        connection.on_message_begin = lambda: calls.append(1)  # type: ignore[method-assign]
        await caller.raw(request("three"))
        assert (await caller.reply()).status == 200
        assert not calls
        assert [seen.json()["prompt"] for seen in server.seen] == ["one", "two", "three"]
        caller.leave()


@pytest.mark.parametrize("host", ["", "Host: localhost\r\n"])
async def test_a_request_of_another_version_shares_nothing(tmp_path: Path, host: str) -> None:
    body = b'{"model": "tiny", "stream": false, "prompt": "hi"}'
    lines = f"{host}Content-Length: {len(body)}\r\n\r\n".encode() + body
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for version, wanted in (("1.0", 200), ("1.1", 200 if host else 400)) * 3:
            caller = await front.connect()
            await caller.raw(f"POST /api/generate HTTP/{version}\r\n".encode() + lines)
            assert (await caller.reply()).status == wanted, version
            caller.leave()


@pytest.mark.parametrize("seed", range(6))
async def test_any_requests_in_any_pieces_come_as_they_were_sent(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    extras = ("", "X-A: 1\r\n", "X-A: 2\r\n", "x-a: 1\r\nX-B: content-length: 9\r\n")
    sent: list[tuple[str, str]] = []
    raw = b""
    extra, name, last = "", "Content-Length", False
    for number in range(250):
        if chance.random() < 0.3:
            extra, name = chance.choice(extras), chance.choice(("Content-Length", "content-length"))
            last = chance.random() < 0.5
        content = f"{number} " + "\r\n\r\nPOST " * chance.choice((0, 0, 1, 40))
        sent.append((content, extra))
        raw += request(content, extra=extra, name=name, last=last)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        at = 0
        while at < len(raw):
            size = chance.choice((1, 3, 50, 200, 221, 700, 5000))
            await caller.raw(raw[at : at + size])
            at += size
        for _ in sent:
            assert (await caller.reply()).status == 200
        assert [seen.json()["prompt"] for seen in server.seen] == [content for content, _ in sent]
        named = [next((v for k, v in seen.headers if k.lower() == "x-a"), None) for seen in server.seen]
        assert named == [
            None if not extra else extra.partition(":")[2].partition("\r")[0].strip() for _, extra in sent
        ]
        caller.leave()


@pytest.mark.parametrize(
    "length",
    ["+{}", "-1", "0x{}", "{}_0", "", "{0}, {0}", "{}\t", " {}", "0{}", "000000000000000000{}", "1e1", "٣"],
)
async def test_an_odd_length_means_the_same_behind_known_heads(tmp_path: Path, length: str) -> None:
    raw = request("odd", length=length)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        fresh = await front.connect()
        await fresh.raw(raw)
        wanted = await fresh.reply()
        fresh.leave()
        caller = await front.connect()
        for _ in range(3):
            await caller.raw(request("usual"))
            assert (await caller.reply()).status == 200
        await caller.raw(raw)
        got = await caller.reply()
        assert (got.status, got.body) == (wanted.status, wanted.body)
        caller.leave()


async def test_a_body_that_is_not_here_whole_is_waited_for(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        for _ in range(3):
            await caller.raw(request("usual"))
            assert (await caller.reply()).status == 200
        raw = request("in pieces")
        await caller.raw(raw[:-5])
        (connection,) = fronts(front)
        await until(lambda: connection._running is not None)
        assert len(server.seen) == 3
        await caller.raw(raw[-5:])
        assert (await caller.reply()).status == 200
        assert server.seen[-1].json()["prompt"] == "in pieces"
        caller.leave()


async def test_a_new_key_is_in_force_on_connections_that_are_kept(tmp_path: Path) -> None:
    extra = "Authorization: Bearer the-old-key-0123456789\r\n"
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, key="the-old-key-0123456789") as front,
    ):
        caller = await front.connect()
        for _ in range(4):
            await caller.raw(request("usual", extra=extra))
            assert (await caller.reply()).status == 200
        front.relay.access.use(keys("the-new-key-0123456789"))
        await caller.raw(request("usual", extra=extra))
        assert (await caller.reply()).status == 401
        caller.leave()


async def test_a_new_connection_begins_with_nothing_of_another_one_where_heads_have_keys(
    tmp_path: Path,
) -> None:
    """Comparing a guess with what another client sends would tell how much of it is right."""
    extra = "Authorization: Bearer a-key-0123456789\r\n"
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, key="a-key-0123456789") as front,
    ):
        first = await front.connect()
        for _ in range(4):
            await first.raw(request("usual", extra=extra))
            assert (await first.reply()).status == 200
        (known,) = fronts(front)
        assert known._known is not None
        second = await front.connect()
        await until(lambda: len(fronts(front)) == 2)
        (other,) = (one for one in fronts(front) if one is not known)
        assert (other._known, other._caller) == (None, None)
        first.leave()
        second.leave()
