"""Connections that nobody needs any more are let go, on both sides."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tests.support.inside import until
from tests.support.relaying import Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_what_a_burst_of_requests_has_opened_is_closed_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.relay.upstream.pool._MOST_IDLE_S", 0.3)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        replies = await asyncio.gather(*(front.ask(TINY) for _ in range(20)))
        assert {reply.status for reply in replies} == {200}
        await until(lambda: front.relay.upstream_connections == 0)
        assert (await front.ask(TINY)).status == 200


async def test_pools_of_addresses_that_are_gone_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.relay.upstream.pool._MOST_IDLE_S", 0.1)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        await front.ask(TINY)
        await until(lambda: front.relay.upstream_connections == 0)
        front.relay.pools.pool("http://127.0.0.1:9")
        assert list(front.relay.pools._pools) == ["http://127.0.0.1:9"]


async def test_who_connects_and_says_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.relay.front._FIRST_HEAD_S", 0.3)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        silent, halting, talking = [await front.connect() for _ in range(3)]
        await halting.raw(b"POST /api/chat HTTP/1.1\r\nHost: local")
        await talking.send(TINY)
        assert (await talking.reply()).status == 200
        assert await silent.ended() == b""
        assert await halting.ended() == b""
        await talking.send(TINY)
        assert (await talking.reply()).status == 200
        for caller in (silent, halting, talking):
            caller.leave()
